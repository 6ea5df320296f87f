#include "checkpoint/verify/verify.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <span>

#include "base/crc32.h"
#include "base/error.h"
#include "base/parallel.h"
#include "checkpoint/load/load_planner.h"
#include "checkpoint/load/metadata_file.h"
#include "checkpoint/load/read_plan.h"
#include "checkpoint/load/record_places.h"
#include "io/file.h"

namespace hsdp_ckpt::checkpoint {
namespace {

const std::string kMetadata = ".metadata";
// As many times is a checkpoint looked at that is saved over meanwhile.
constexpr int kReadings = 10;

class Verifier {
 public:
  Verifier(io::FileSystem& fs, const std::string& directory, int threads)
      : fs_(fs), directory_(directory), threads_(threads) {}

  VerifyReport Run() {
    std::vector<std::string> names;
    try {
      names = io::ListDirectory(fs_, directory_);
    } catch (const base::Error& error) {
      Report(".", "", error);
      return report_;
    }
    const std::vector<std::string> metadata = MetadataFiles(names);
    if (metadata.empty())
      Report(kMetadata, "", "no .metadata: no checkpoint is here, or its save did not end");
    for (const std::string& name : metadata) CheckMetadata(name);
    CheckFiles();
    // Without metadata nothing says which files belong to a checkpoint.
    if (!metadata.empty()) FindLeftovers(names);
    Summarize();
    return std::move(report_);
  }

 private:
  /// A record as `.metadata` has it.
  struct ExpectedRecord {
    std::string name;
    format::StorageInfo place;
    bool is_tensor = false;
    std::string dtype;
    format::Shape shape;
    uint32_t owner = 0;
  };
  using Records = std::vector<ExpectedRecord>;
  using ChunksByOffset = std::map<format::Shape, const format::ChunkMetadata*>;
  using ChunksByName = std::map<std::string_view, ChunksByOffset>;

  void Report(const std::string& file, const std::string& record, const std::string& message) {
    const std::lock_guard lock(mutex_);
    report_.problems.push_back({file, record, message});
  }
  void Report(const std::string& file, const std::string& record, const std::exception& error) {
    // Errors name file and record themselves; here they stand beside the message.
    std::string_view message = error.what();
    const auto drop = [&](const std::string& prefix) {
      const bool there = message.starts_with(prefix);
      if (there) message.remove_prefix(prefix.size());
      return there;
    };
    drop(io::JoinPath(directory_, file) + ": ");
    if (!record.empty() && !drop(record + ": ")) drop(record + " ");
    Report(file, record, std::string(message));
  }

  // The checkpoint's `.metadata`, or those of all ranks: a save without collectives leaves one for
  // each rank, with that rank's chunks only.
  static std::vector<std::string> MetadataFiles(const std::vector<std::string>& names) {
    if (std::find(names.begin(), names.end(), kMetadata) != names.end()) return {kMetadata};
    std::vector<std::string> found;
    for (const std::string& name : names) {
      if (name.starts_with("__") && name.ends_with(kMetadata)) found.push_back(name);
    }
    return found;
  }

  // Checks a metadata file in itself, and notes in `files_` what it says of records.
  void CheckMetadata(const std::string& name) {
    std::optional<LoadPlanner> planner;
    try {
      const std::string path = io::JoinPath(directory_, name);
      planner.emplace(format::DecodeMetadata(ReadMetadataFile(fs_, directory_, name), path), path);
    } catch (const base::Error& error) {
      return Report(name, "", error);
    }
    CheckPlaces(*planner, name);
    for (const auto& [fqn, entry] : planner->metadata().state_dict_metadata)
      CheckEntry(*planner, name, fqn, entry);
    if (!planner->metadata().storage_data)
      return Report(name, "", "no storage_data: the records' places are missing");
    const ChunksByName chunks = ChunksOf(planner->metadata());
    for (const auto& [index, place] : *planner->metadata().storage_data) {
      auto expected = Expect(*planner, chunks, name, index, place);
      if (expected) files_[place.relative_path].push_back(std::move(*expected));
    }
  }

  void CheckPlaces(const LoadPlanner& planner, const std::string& file) {
    try {
      CheckRecordsDisjoint(planner.metadata(), planner.path());
    } catch (const base::CorruptionError& error) {
      Report(file, error.record(), error);
    }
  }

  // That an entry has all of its records, and that its chunks cover a tensor once.
  void CheckEntry(const LoadPlanner& planner, const std::string& file, const std::string& fqn,
                  const format::EntryMetadata& entry) {
    const bool is_tensor = std::holds_alternative<format::TensorMetadata>(entry);
    (is_tensor ? tensors_ : objects_).insert(fqn);
    try {
      if (!is_tensor) planner.PlaceOfObject(fqn);
      if (is_tensor && file == kMetadata) planner.CheckCovered(fqn);
    } catch (const base::Error& error) {
      Report(file, fqn, error);
    }
  }

  static ChunksByName ChunksOf(const format::Metadata& metadata) {
    ChunksByName chunks;
    for (const auto& [fqn, entry] : metadata.state_dict_metadata) {
      const auto* tensor = std::get_if<format::TensorMetadata>(&entry);
      if (tensor == nullptr) continue;
      for (const format::ChunkMetadata& chunk : tensor->chunks)
        chunks[fqn].emplace(chunk.offsets, &chunk);
    }
    return chunks;
  }

  // What the record at `place` should be; nothing, and a report, if no entry has such a record.
  std::optional<ExpectedRecord> Expect(const LoadPlanner& planner, const ChunksByName& chunks,
                                       const std::string& file, const format::MetadataIndex& index,
                                       const format::StorageInfo& place) {
    ExpectedRecord expected{index.fqn, place, false, {}, {}};
    const format::Shape chunk = index.offset.value_or(format::Shape{});
    expected.owner = format::RecordOwner(index.fqn, chunk);
    const format::EntryMetadata* entry = planner.Find(index.fqn);
    if (entry == nullptr) {
      Report(file, index.fqn, "a record of a name that state_dict_metadata has not");
      return std::nullopt;
    }
    const auto* tensor = std::get_if<format::TensorMetadata>(entry);
    if (tensor == nullptr) return expected;
    const auto of_tensor = chunks.find(index.fqn);
    if (of_tensor == chunks.end() || !of_tensor->second.contains(chunk)) {
      Report(file, index.fqn, "a record for a chunk that the tensor has not");
      return std::nullopt;
    }
    expected.is_tensor = true;
    expected.dtype = format::Name(tensor->properties.dtype);
    expected.shape = of_tensor->second.at(chunk)->sizes;
    return expected;
  }

  void CheckFiles() {
    std::vector<const std::pair<const std::string, Records>*> files;
    for (const auto& file : files_) files.push_back(&file);
    // Few files: threads within each. Many: the files themselves, each read by one.
    const int outer = files.size() >= static_cast<size_t>(threads_) ? threads_ : 1;
    base::ParallelFor(files.size(), outer, [&](size_t i) {
      CheckFile(files[i]->first, files[i]->second, threads_ / outer);
    });
  }

  void FindLeftovers(const std::vector<std::string>& names) {
    for (const std::string& name : names) {
      if (name.ends_with(".distcp") && !files_.contains(name)) report_.leftovers.push_back(name);
    }
  }

  void Summarize() {
    report_.tensors = static_cast<int64_t>(tensors_.size());
    report_.objects = static_cast<int64_t>(objects_.size());
    report_.files = static_cast<int64_t>(files_.size());
    std::sort(report_.leftovers.begin(), report_.leftovers.end());
    std::sort(report_.unchecked.begin(), report_.unchecked.end());
    std::stable_sort(report_.problems.begin(), report_.problems.end(),
                     [](const VerifyProblem& a, const VerifyProblem& b) {
                       return std::tie(a.file, a.record) < std::tie(b.file, b.record);
                     });
  }

  void CheckFile(const std::string& name, const Records& records, int threads) {
    std::vector<std::unique_ptr<ShardFileReader>> file;
    try {
      file.push_back(std::make_unique<ShardFileReader>(fs_, directory_, name, /*direct=*/false));
    } catch (const std::exception&
                 error) {  // of holes a file can be larger than memory, and have an index that is
      return Report(name, "", error);
    }
    std::vector<PlannedRead> reads;
    std::set<std::pair<int64_t, int64_t>> read_already;
    int64_t bytes = 0;
    for (const ExpectedRecord& record : records) {
      try {
        // However often `.metadata` names a record, its bytes are read once.
        const bool is_first = read_already.emplace(record.place.offset, record.place.length).second;
        bytes += is_first ? std::max(record.place.length, int64_t{0}) : 0;
        if (bytes > file[0]->size()) return Report(name, "", "its records overlap, or lie outside");
        auto read = Describe(*file[0], name, record, is_first);
        if (read && is_first) reads.push_back({0, std::move(*read)});
      } catch (const base::Error& error) {
        Report(name, record.name, error);
      }
    }
    if (file[0]->has_index()) CheckAllNamed(*file[0], name, records);
    if (ReadAll(file, name, reads, threads)) return;
    // Something is wrong: one record at a time says in which of them.
    for (const PlannedRead& read : reads) {
      std::optional<ReadPlan> plan;
      try {
        plan.emplace(file, std::vector{read});
        plan->ReadAll(threads);
      } catch (const base::Error& error) {
        Report(name, read.read.name, error);
      }
      const std::lock_guard lock(mutex_);
      if (plan) report_.bytes += plan->bytes_read();
    }
  }

  bool ReadAll(const std::vector<std::unique_ptr<ShardFileReader>>& file, const std::string& name,
               const std::vector<PlannedRead>& reads, int threads) {
    try {
      ReadPlan plan(file, reads);
      plan.ReadAll(threads);
      const std::lock_guard lock(mutex_);
      report_.bytes += plan.bytes_read();
      return true;
    } catch (const base::CorruptionError&) {
      return false;
    } catch (const base::Error& error) {
      Report(name, "", error);
      return true;
    }
  }

  // How a record's payload is read; nothing if it has been read already, or can't be checked.
  // `is_first`: no other name has the same record.
  std::optional<PayloadRead> Describe(ShardFileReader& file, const std::string& name,
                                      const ExpectedRecord& record, bool is_first) {
    const auto& place = record.place;
    const auto tensor = file.Describe(record.name, place.offset, place.length, record.owner);
    PayloadRead read{record.name, place.offset, place.length};
    if (tensor) {
      CheckKind(file, record, *tensor);
      read.size = tensor->storage_bytes;
      return read;
    }
    if (file.has_index()) {
      // An object's bytes, or those of a tensor that only torch can rebuild.
      read.size = place.length;
      return read;
    }
    if (is_first) ReadUnindexed(file, name, record);
    return std::nullopt;
  }

  // That a record is the tensor that `.metadata` says.
  static void CheckKind(const ShardFileReader& file, const ExpectedRecord& record,
                        const format::TensorDescription& tensor) {
    if (record.is_tensor && tensor.dtype->name == record.dtype && tensor.shape == record.shape)
      return;
    const std::string expected = record.is_tensor
                                     ? record.dtype + " of shape " + base::ShapeText(record.shape)
                                     : "an object";
    throw base::CorruptionError(
        file.file().path(), record.name, expected,
        std::string(tensor.dtype->name) + " of shape " + base::ShapeText(tensor.shape));
  }

  // Reads a stock record that is no plain tensor, which checks it if it is a zip.
  void ReadUnindexed(const ShardFileReader& file, const std::string& name,
                     const ExpectedRecord& record) {
    const auto& place = record.place;
    const std::vector<std::byte> bytes = file.ReadBytes(record.name, place.offset, place.length);
    const bool encoded = place.transform_descriptors && !place.transform_descriptors->empty();
    const bool is_zip =
        bytes.size() >= 2 && bytes[0] == std::byte{'P'} && bytes[1] == std::byte{'K'};
    const std::lock_guard lock(mutex_);
    report_.bytes += place.length;
    if (encoded || !is_zip) report_.unchecked.push_back(name + ": " + record.name);
  }

  void CheckAllNamed(const ShardFileReader& file, const std::string& name, const Records& records) {
    std::set<std::pair<int64_t, int64_t>> named;
    for (const ExpectedRecord& record : records)
      named.emplace(record.place.offset, record.place.length);
    for (const format::IndexEntry& entry : file.index().entries) {
      if (!named.contains({entry.offset, entry.length()}))
        Report(name, "",
               "a record of " + std::to_string(entry.length()) + " bytes at " +
                   std::to_string(entry.offset) + " that .metadata does not name");
    }
  }

  io::FileSystem& fs_;
  const std::string& directory_;
  int threads_;
  std::set<std::string> tensors_, objects_;  // names
  std::map<std::string, Records> files_;     // what `.metadata` says that each file has
  std::mutex mutex_;
  VerifyReport report_;
};

// Which checkpoint is here: the checksum of each metadata file, without its last bytes, which may
// be its checksum: with them all files would have the same one. Nothing of one that can't be read.
std::map<std::string, uint32_t> ChecksumsOfMetadata(io::FileSystem& fs,
                                                    const std::string& directory) {
  std::map<std::string, uint32_t> checksums;
  try {
    for (const std::string& name : io::ListDirectory(fs, directory)) {
      if (!name.ends_with(kMetadata)) continue;
      const auto file = ReadMetadataFile(fs, directory, name);
      const std::span<const std::byte> bytes = file;
      checksums[name] = base::Crc32(bytes.first(bytes.size() - std::min<size_t>(4, bytes.size())));
    }
  } catch (const base::Error&) {
    // The verifier meets the same, and reports it.
  }
  return checksums;
}

}  // namespace

VerifyReport Verify(io::FileSystem& fs, const std::string& directory, int threads) {
  for (int reading = 1;; ++reading) {
    const auto before = ChecksumsOfMetadata(fs, directory);
    VerifyReport report = Verifier(fs, directory, std::max(threads, 1)).Run();
    // A save that commits meanwhile removes the files of the checkpoint before, which is no damage.
    if (report.problems.empty() || ChecksumsOfMetadata(fs, directory) == before) return report;
    if (reading < kReadings) continue;
    report.problems = {{".", "", "saved over again and again while it was verified"}};
    return report;
  }
}

}  // namespace hsdp_ckpt::checkpoint
