// hsdp-ckpt: what is in a checkpoint, and whether all of it is as it was written. Needs neither
// Python nor torch.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/printable.h"
#include "checkpoint/load/metadata_file.h"
#include "checkpoint/verify/verify.h"
#include "format/metadata.h"
#include "format/trailer.h"
#include "io/file.h"

namespace hsdp_ckpt::cli {
namespace {

constexpr const char* kUsage =
    "usage: hsdp-ckpt verify [--threads N] DIR   reads all of a checkpoint and checks every byte\n"
    "       hsdp-ckpt inspect [--all] DIR        says what is in it, from .metadata alone\n"
    "\n"
    "DIR: a directory that torch_hsdp_ckpt or torch.distributed.checkpoint has saved to.\n"
    "Exit code: 0 all is well, 1 something is wrong with the checkpoint (bytes, files that are "
    "missing or that the system\n"
    "refuses to read) or DIR holds none (it has no .metadata), 2 the command could not be run "
    "(arguments, no such DIR).\n";

using base::Printable;

std::string Mebibytes(double bytes) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.1f MiB", bytes / 1048576.0);
  return text;
}

int RunVerify(const std::string& directory, int threads) {
  const checkpoint::VerifyReport report =
      checkpoint::Verify(io::PosixFileSystem(), directory, threads);
  for (const checkpoint::VerifyProblem& problem : report.problems) {
    const std::string where =
        problem.record.empty() ? problem.file : problem.file + ": " + problem.record;
    std::printf("WRONG      %s: %s\n", Printable(where).c_str(),
                Printable(problem.message).c_str());
  }
  for (const std::string& name : report.unchecked)
    std::printf("unchecked  %s (it has no checksum)\n", Printable(name).c_str());
  for (const std::string& name : report.leftovers)
    std::printf(
        "leftover   %s (.metadata does not name it: of a save that did not end, or of an older "
        "one)\n",
        Printable(name).c_str());
  std::printf("%s: %" PRId64 " tensors and %" PRId64 " objects in %" PRId64
              " files, %s read, %zu problems\n",
              directory.c_str(), report.tensors, report.objects, report.files,
              Mebibytes(static_cast<double>(report.bytes)).c_str(), report.problems.size());
  return report.problems.empty() ? 0 : 1;
}

// What all records of one data file are together.
struct FileSummary {
  int64_t records = 0;
  double bytes = 0;  // hostile lengths add up to any sum
};

std::map<std::string, FileSummary> SummarizeFiles(const format::Metadata& metadata) {
  std::map<std::string, FileSummary> files;
  if (!metadata.storage_data) return files;
  for (const auto& [index, place] : *metadata.storage_data) {
    FileSummary& file = files[place.relative_path];
    ++file.records;
    file.bytes += static_cast<double>(place.length);
  }
  return files;
}

std::string DescribeEntry(const format::EntryMetadata& entry) {
  const auto* tensor = std::get_if<format::TensorMetadata>(&entry);
  if (tensor == nullptr) return "object";
  const size_t chunks = tensor->chunks.size();
  return std::string(format::Name(tensor->properties.dtype)) + " " + base::ShapeText(tensor->size) +
         " in " + std::to_string(chunks) + (chunks == 1 ? " chunk" : " chunks");
}

void PrintCounts(const format::Metadata& metadata) {
  size_t tensors = 0, chunks = 0;
  for (const auto& [name, entry] : metadata.state_dict_metadata) {
    const auto* tensor = std::get_if<format::TensorMetadata>(&entry);
    if (tensor == nullptr) continue;
    ++tensors;
    chunks += tensor->chunks.size();
  }
  std::printf("tensors         %zu in %zu chunks\nobjects         %zu\n", tensors, chunks,
              metadata.state_dict_metadata.size() - tensors);
}

void PrintFiles(const std::map<std::string, FileSummary>& files, size_t shown) {
  double total = 0;
  for (const auto& [name, file] : files) total += file.bytes;
  std::printf("files           %zu, %s of records\n", files.size(), Mebibytes(total).c_str());
  for (const auto& [name, file] : files) {
    if (shown-- == 0) break;
    std::printf("  %s  %" PRId64 " records, %s\n", Printable(name).c_str(), file.records,
                Mebibytes(file.bytes).c_str());
  }
}

void PrintEntries(const format::Metadata& metadata, size_t shown) {
  std::printf("entries\n");
  const auto& entries = metadata.state_dict_metadata;
  for (size_t i = 0; i < std::min(entries.size(), shown); ++i) {
    std::printf("  %s  %s\n", Printable(entries[i].first).c_str(),
                DescribeEntry(entries[i].second).c_str());
  }
  if (entries.size() > shown) std::printf("  ... (--all shows all)\n");
}

int RunInspect(const std::string& directory, bool all) {
  io::FileStatus status;
  if (!io::GetStatus(io::PosixFileSystem(), directory + "/.metadata", &status)) {
    std::printf(
        "WRONG      .metadata: no .metadata: no checkpoint is here, or its save did not end\n");
    return 1;
  }
  const std::vector<std::byte> bytes =
      checkpoint::ReadMetadataFile(io::PosixFileSystem(), directory, ".metadata");
  const std::string path = io::JoinPath(directory, ".metadata");
  const format::Metadata metadata = format::DecodeMetadata(bytes, path);
  const bool ours = format::CheckMetadataTrailer(bytes, path).checked;
  const size_t shown = all ? std::numeric_limits<size_t>::max() : 20;
  std::printf("written by      %s\n", ours ? "torch_hsdp_ckpt (its metadata has a checksum)"
                                           : "torch.distributed.checkpoint");
  if (metadata.version) std::printf("format version  %s\n", Printable(*metadata.version).c_str());
  PrintCounts(metadata);
  PrintFiles(SummarizeFiles(metadata), shown);
  PrintEntries(metadata, shown);
  return 0;
}

struct Options {
  bool help = false;
  bool all = false;
  int threads = static_cast<int>(std::max(2u, std::min(8u, std::thread::hardware_concurrency())));
  std::string command;
  std::string directory;
};

std::optional<int> ParseThreads(const std::string& text) {
  char* end = nullptr;
  const long threads = std::strtol(text.c_str(), &end, 10);
  if (*end != '\0' || threads < 1 || threads > 1024) return std::nullopt;
  return static_cast<int>(threads);
}

// Nothing for arguments that make no command.
std::optional<Options> Parse(const std::vector<std::string>& arguments) {
  Options options;
  bool wrong = false;  // --help is obeyed behind a wrong argument, too
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument == "--help" || argument == "-h") {
      options.help = true;
      return options;
    }
    if (argument == "--threads" && i + 1 < arguments.size()) {
      const std::optional<int> threads = ParseThreads(arguments[++i]);
      wrong = wrong || !threads;
      options.threads = threads.value_or(1);
    } else if (argument == "--all") {
      options.all = true;
    } else if (argument.starts_with("-") || !options.directory.empty()) {
      wrong = true;
    } else {
      (options.command.empty() ? options.command : options.directory) = argument;
    }
  }
  const bool known = options.command == "verify" || options.command == "inspect";
  if (wrong || !known || options.directory.empty()) return std::nullopt;
  return options;
}

int Main(const std::vector<std::string>& arguments) {
  const std::optional<Options> options = Parse(arguments);
  if (!options) {
    std::fputs(kUsage, stderr);
    return 2;
  }
  if (options->help) {
    std::fputs(kUsage, stdout);
    return 0;
  }
  const std::string& directory = options->directory;
  io::FileStatus status;
  if (!io::GetStatus(io::PosixFileSystem(), directory, &status) || !status.is_directory) {
    std::fprintf(stderr, "hsdp-ckpt: %s is not a directory\n", directory.c_str());
    return 2;
  }
  try {
    return options->command == "verify" ? RunVerify(directory, options->threads)
                                        : RunInspect(directory, options->all);
  } catch (const base::Error& error) {
    std::fprintf(stderr, "hsdp-ckpt: %s\n", Printable(error.what()).c_str());
    return 1;
  }
}

}  // namespace
}  // namespace hsdp_ckpt::cli

int main(int argc, char** argv) {
  try {
    return hsdp_ckpt::cli::Main({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "hsdp-ckpt: %s\n", hsdp_ckpt::base::Printable(error.what()).c_str());
    return 2;
  }
}
