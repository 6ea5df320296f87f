// hsdp-ckpt: what is in a checkpoint, and whether all of it is as it was written. Needs neither
// Python nor torch.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
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

// Names come from the checkpoint: nothing in them is to move the cursor or worse.
std::string Printable(std::string text) {
  for (size_t i = 0; i < text.size(); ++i) {
    const auto c = static_cast<unsigned char>(text[i]);
    // U+0080 to U+009F, two bytes in UTF-8, are control characters as well.
    const bool second =
        i + 1 < text.size() && c == 0xc2 && static_cast<unsigned char>(text[i + 1]) < 0xa0;
    if (c < 0x20 || c == 0x7f || second) text[i] = '?';
    if (second) text[++i] = '?';
  }
  return text;
}

std::string Mebibytes(double bytes) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.1f MiB", bytes / 1048576.0);
  return text;
}

int RunVerify(const std::string& directory, int threads) {
  const checkpoint::VerifyReport report =
      checkpoint::Verify(io::PosixFileSystem(), directory, threads);
  for (const checkpoint::Problem& problem : report.problems) {
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
  // Records and their bytes, which hostile lengths add up to any sum.
  std::map<std::string, std::pair<int64_t, double>> files;
  if (metadata.storage_data) {
    for (const auto& [index, place] : *metadata.storage_data) {
      auto& [records, size] = files[place.relative_path];
      ++records;
      size += static_cast<double>(place.length);
    }
  }
  size_t tensors = 0, chunks = 0;
  constexpr size_t kShown = 20;
  std::string lines;
  for (size_t i = 0; i < metadata.state_dict_metadata.size(); ++i) {
    const auto& [name, entry] = metadata.state_dict_metadata[i];
    const auto* tensor = std::get_if<format::TensorMetadata>(&entry);
    tensors += tensor != nullptr;
    chunks += tensor != nullptr ? tensor->chunks.size() : 0;
    if (!all && i >= kShown) continue;
    lines += "  " + Printable(name) + "  ";
    lines += tensor == nullptr ? "object"
                               : std::string(format::Name(tensor->properties.dtype)) + " " +
                                     base::ShapeText(tensor->size) + " in " +
                                     std::to_string(tensor->chunks.size()) +
                                     (tensor->chunks.size() == 1 ? " chunk" : " chunks");
    lines += "\n";
  }
  std::printf("written by      %s\n", ours ? "torch_hsdp_ckpt (its metadata has a checksum)"
                                           : "torch.distributed.checkpoint");
  if (metadata.version) std::printf("format version  %s\n", Printable(*metadata.version).c_str());
  std::printf("tensors         %zu in %zu chunks\nobjects         %zu\n", tensors, chunks,
              metadata.state_dict_metadata.size() - tensors);
  double total = 0;
  for (const auto& [name, counts] : files) total += counts.second;
  std::printf("files           %zu, %s of records\n", files.size(), Mebibytes(total).c_str());
  size_t shown = 0;
  for (const auto& [name, counts] : files) {
    if (!all && shown++ >= kShown) break;
    std::printf("  %s  %" PRId64 " records, %s\n", Printable(name).c_str(), counts.first,
                Mebibytes(counts.second).c_str());
  }
  std::printf("entries\n%s", lines.c_str());
  if (!all && metadata.state_dict_metadata.size() > kShown)
    std::printf("  ... (--all shows all)\n");
  return 0;
}

int Main(std::vector<std::string> arguments) {
  std::string command, directory;
  int threads = static_cast<int>(std::max(2u, std::min(8u, std::thread::hardware_concurrency())));
  bool all = false, wrong = arguments.empty();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument == "--help" || argument == "-h") {
      std::fputs(kUsage, stdout);
      return 0;
    }
    if (argument == "--threads" && i + 1 < arguments.size()) {
      char* end = nullptr;
      threads = static_cast<int>(std::strtol(arguments[++i].c_str(), &end, 10));
      wrong = wrong || *end != '\0' || threads < 1 || threads > 1024;
    } else if (argument == "--all") {
      all = true;
    } else if (argument.starts_with("-")) {
      wrong = true;
    } else if (command.empty()) {
      command = argument;
    } else if (directory.empty()) {
      directory = argument;
    } else {
      wrong = true;
    }
  }
  if (wrong || directory.empty() || (command != "verify" && command != "inspect")) {
    std::fputs(kUsage, stderr);
    return 2;
  }
  io::FileStatus status;
  if (!io::GetStatus(io::PosixFileSystem(), directory, &status) || !status.is_directory) {
    std::fprintf(stderr, "hsdp-ckpt: %s is not a directory\n", directory.c_str());
    return 2;
  }
  try {
    return command == "verify" ? RunVerify(directory, threads) : RunInspect(directory, all);
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
    std::fprintf(stderr, "hsdp-ckpt: %s\n", hsdp_ckpt::cli::Printable(error.what()).c_str());
    return 2;
  }
}
