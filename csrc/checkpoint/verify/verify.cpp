#include "checkpoint/verify/verify.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <set>

#include "base/error.h"
#include "base/parallel.h"
#include "checkpoint/load/load_planner.h"
#include "checkpoint/load/metadata_file.h"
#include "checkpoint/load/read_plan.h"
#include "io/file.h"

namespace hsdp_ckpt::checkpoint {
namespace {

const std::string kMetadata = ".metadata";

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
    // A save without collectives leaves one for each rank, of that rank's chunks only.
    std::vector<std::string> metadata;
    for (const std::string& name : names) {
      if (name == kMetadata || (name.starts_with("__") && name.ends_with(kMetadata)))
        metadata.push_back(name);
    }
    const bool whole = std::find(metadata.begin(), metadata.end(), kMetadata) != metadata.end();
    if (whole) metadata = {kMetadata};
    if (metadata.empty())
      Report(kMetadata, "", "no .metadata: no checkpoint is here, or its save did not end");
    std::set<std::string> tensors, objects;
    for (const std::string& name : metadata) ReadMetadata(name, whole, tensors, objects);
    report_.tensors = static_cast<int64_t>(tensors.size());
    report_.objects = static_cast<int64_t>(objects.size());
    report_.files = static_cast<int64_t>(files_.size());

    std::vector<const std::pair<const std::string, std::vector<Expected>>*> files;
    for (const auto& file : files_) files.push_back(&file);
    // Few files: threads within each. Many: the files themselves, each read by one.
    const int outer = files.size() >= static_cast<size_t>(threads_) ? threads_ : 1;
    base::ParallelFor(files.size(), outer, [&](size_t i) {
      CheckFile(files[i]->first, files[i]->second, threads_ / outer);
    });
    for (const std::string& name : names) {
      if (name.ends_with(".distcp") && !files_.contains(name) && !metadata.empty())
        report_.leftovers.push_back(name);
    }
    std::sort(report_.leftovers.begin(), report_.leftovers.end());
    std::sort(report_.unchecked.begin(), report_.unchecked.end());
    std::stable_sort(report_.problems.begin(), report_.problems.end(),
                     [](const Problem& a, const Problem& b) {
                       return std::tie(a.file, a.record) < std::tie(b.file, b.record);
                     });
    return std::move(report_);
  }

 private:
  /// A record as `.metadata` has it.
  struct Expected {
    std::string name;
    format::StorageInfo place;
    bool is_tensor = false;
    std::string dtype;
    format::Shape shape;
  };

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

  void ReadMetadata(const std::string& name, bool whole, std::set<std::string>& tensors,
                    std::set<std::string>& objects) {
    std::optional<LoadPlanner> planner;
    try {
      const std::string path = io::JoinPath(directory_, name);
      planner.emplace(format::DecodeMetadata(ReadMetadataFile(fs_, directory_, name), path), path);
    } catch (const base::Error& error) {
      return Report(name, "", error);
    }
    for (const auto& [fqn, entry] : planner->metadata().state_dict_metadata) {
      const auto* tensor = std::get_if<format::TensorMetadata>(&entry);
      (tensor != nullptr ? tensors : objects).insert(fqn);
      try {
        if (tensor == nullptr) planner->PlaceOfObject(fqn);
        if (tensor != nullptr && whole)
          planner->Plan(fqn, {format::Shape(tensor->size.size()), tensor->size});
      } catch (const base::Error& error) {
        Report(name, fqn, error);
      }
    }
    if (!planner->metadata().storage_data)
      return Report(name, "", "no storage_data: the records' places are missing");
    std::map<std::string_view, std::map<format::Shape, const format::ChunkMetadata*>> chunks;
    for (const auto& [fqn, entry] : planner->metadata().state_dict_metadata) {
      if (const auto* tensor = std::get_if<format::TensorMetadata>(&entry)) {
        for (const format::ChunkMetadata& chunk : tensor->chunks)
          chunks[fqn].emplace(chunk.offsets, &chunk);
      }
    }
    for (const auto& [index, place] : *planner->metadata().storage_data) {
      Expected expected{index.fqn, place, false, {}, {}};
      const format::EntryMetadata* entry = planner->Find(index.fqn);
      if (entry == nullptr) {
        Report(name, index.fqn, "a record of a name that state_dict_metadata has not");
        continue;
      }
      if (const auto* tensor = std::get_if<format::TensorMetadata>(entry)) {
        const auto chunk = chunks[index.fqn].find(index.offset.value_or(format::Shape{}));
        if (chunk == chunks[index.fqn].end()) {
          Report(name, index.fqn, "a record for a chunk that the tensor has not");
          continue;
        }
        expected.is_tensor = true;
        expected.dtype = format::Name(tensor->properties.dtype);
        expected.shape = chunk->second->sizes;
      }
      files_[place.relative_path].push_back(std::move(expected));
    }
  }

  void CheckFile(const std::string& name, const std::vector<Expected>& records, int threads) {
    std::vector<std::unique_ptr<ShardFileReader>> file;
    try {
      file.push_back(std::make_unique<ShardFileReader>(fs_, directory_, name, /*direct=*/false));
    } catch (const std::exception&
                 error) {  // of holes a file can be larger than memory, and have an index that is
      return Report(name, "", error);
    }
    std::vector<PlannedRead> reads;
    for (const Expected& record : records) {
      try {
        if (auto read = Describe(*file[0], name, record)) reads.push_back({0, std::move(*read)});
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
  std::optional<PayloadRead> Describe(ShardFileReader& file, const std::string& name,
                                      const Expected& record) {
    const auto& place = record.place;
    const auto tensor = file.Describe(record.name, place.offset, place.length);
    PayloadRead read{record.name, place.offset, place.length};
    if (tensor) {
      if (!record.is_tensor || tensor->dtype->name != record.dtype ||
          tensor->shape != record.shape) {
        const std::string expected =
            record.is_tensor ? record.dtype + " of shape " + base::ShapeText(record.shape)
                             : "an object";
        throw base::CorruptionError(
            file.file().path(), record.name, expected,
            std::string(tensor->dtype->name) + " of shape " + base::ShapeText(tensor->shape));
      }
      read.size = tensor->storage_bytes;
      return read;
    }
    const bool encoded = place.transform_descriptors && !place.transform_descriptors->empty();
    if (file.has_index()) {
      read.size =
          place.length;  // an object's bytes, or those of a tensor that only torch can rebuild
      return read;
    }
    const std::vector<std::byte> bytes = file.ReadBytes(record.name, place.offset, place.length);
    const std::lock_guard lock(mutex_);
    report_.bytes += place.length;
    const auto zip = std::span(bytes).first(std::min<size_t>(bytes.size(), 2));
    if (encoded || zip.size() < 2 || zip[0] != std::byte{'P'} || zip[1] != std::byte{'K'})
      report_.unchecked.push_back(name + ": " + record.name);
    return std::nullopt;
  }

  void CheckAllNamed(const ShardFileReader& file, const std::string& name,
                     const std::vector<Expected>& records) {
    std::set<std::pair<int64_t, int64_t>> named;
    for (const Expected& record : records) named.emplace(record.place.offset, record.place.length);
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
  std::map<std::string, std::vector<Expected>> files_;
  std::mutex mutex_;
  VerifyReport report_;
};

}  // namespace

VerifyReport Verify(io::FileSystem& fs, const std::string& directory, int threads) {
  return Verifier(fs, directory, std::max(threads, 1)).Run();
}

}  // namespace hsdp_ckpt::checkpoint
