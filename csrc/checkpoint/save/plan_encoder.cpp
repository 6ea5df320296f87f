// The whole metadata of a save, from its plan: what there is of each tensor, the paths of the
// names, and where each record lies.
#include <charconv>
#include <deque>
#include <iterator>
#include <numeric>
#include <span>
#include <utility>

#include "base/error.h"
#include "checkpoint/save/save_plan.h"
#include "format/encoder.h"

namespace hsdp_ckpt::checkpoint {
namespace {

// Every tensor's chunks: those of tensor i are the ones from first[i] to first[i + 1].
struct ChunksByTensor {
  struct Place {
    uint32_t rank;
    uint32_t chunk;  // among the rank's chunks
  };
  std::vector<size_t> first;
  std::vector<Place> places;  // by rank
};

ChunksByTensor GroupByTensor(const std::vector<ChunkList>& by_rank, size_t tensors) {
  ChunksByTensor out;
  out.first.resize(tensors + 1);
  for (const ChunkList& chunks : by_rank) {
    for (size_t i = 0; i < chunks.size(); ++i) ++out.first[chunks.tensor(i) + 1];
  }
  std::partial_sum(out.first.begin(), out.first.end(), out.first.begin());
  out.places.resize(out.first.back());
  std::vector<size_t> next(out.first.begin(), out.first.end() - 1);
  for (size_t rank = 0; rank < by_rank.size(); ++rank) {
    for (size_t i = 0; i < by_rank[rank].size(); ++i) {
      out.places[next[by_rank[rank].tensor(i)]++] = {static_cast<uint32_t>(rank),
                                                     static_cast<uint32_t>(i)};
    }
  }
  return out;
}

// About what the encoded metadata takes: a string that grows touches twice as much memory.
size_t ExpectedBytes(const std::vector<PlannedTensor>& tensors, size_t chunks) {
  size_t expected = 4096 + 128 * chunks;
  for (const PlannedTensor& planned : tensors) expected += 128 + 2 * planned.fqn.size();
  return expected;
}

format::TensorMetadata TensorEntry(const PlannedTensor& planned) {
  const auto dtype = format::DtypeFromName(planned.dtype->name);
  if (!dtype)
    throw base::Error(planned.fqn + ": metadata has no dtype " + std::string(planned.dtype->name));
  format::TensorMetadata entry;
  entry.properties.dtype = *dtype;
  entry.properties.pin_memory = planned.pinned;
  if (planned.strides) entry.properties.strides = *planned.strides;
  entry.size = *planned.size;
  return entry;
}

void EncodeTensors(format::MetadataEncoder& encoder, const std::vector<PlannedTensor>& tensors,
                   const std::vector<ChunkList>& by_rank, const ChunksByTensor& grouped) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    format::TensorMetadata entry = TensorEntry(tensors[i]);
    for (size_t at = grouped.first[i]; at < grouped.first[i + 1]; ++at) {
      const auto [rank, number] = grouped.places[at];
      PlannedChunk chunk = by_rank[rank][number];
      entry.chunks.push_back({std::move(chunk.offsets), std::move(chunk.sizes)});
    }
    encoder.Entry(tensors[i].fqn, entry);
  }
}

void EncodePath(format::MetadataEncoder& encoder, std::string_view name,
                std::span<const PlannedPaths::Part> parts) {
  std::vector<format::PathPart> path;
  size_t at = 0;
  for (const PlannedPaths::Part& part : parts) {
    const std::string_view text = name.substr(at, part.bytes);
    at += part.bytes + 1;
    int64_t number = 0;
    if (!part.is_index) {
      path.emplace_back(text);
    } else if (std::from_chars(text.data(), text.data() + text.size(), number).ec == std::errc()) {
      path.emplace_back(number);
    } else {
      throw base::Error(std::string(name) + ": no index of a list at '" + std::string(text) + "'");
    }
  }
  encoder.Path(name, path);
}

// The paths of the tensors, then of the writers' objects.
void EncodePaths(format::MetadataEncoder& encoder, const PlannedPaths& paths,
                 const std::vector<PlannedTensor>& tensors,
                 std::span<const SavePlan::Writer> writers) {
  encoder.BeginPaths();
  size_t begin = 0, number = 0;
  const auto encode_next = [&](const std::string& name) {
    const size_t parts = paths.counts.at(number++);
    EncodePath(encoder, name, std::span(paths.parts).subspan(begin, parts));
    begin += parts;
  };
  for (const PlannedTensor& planned : tensors) encode_next(planned.fqn);
  for (const SavePlan::Writer& writer : writers) {
    for (const auto& object : writer.objects) encode_next(object.first);
  }
}

// Writes where the records of all ranks lie, rank by rank, and notes the files.
class RecordsEncoder {
 public:
  RecordsEncoder(format::MetadataEncoder& encoder, const std::vector<PlannedTensor>& tensors,
                 uint64_t save_id, bool single_file)
      : encoder_(encoder),
        tensors_(tensors),
        save_id_(save_id),
        single_file_(single_file),
        chunks_of_tensor_(tensors.size()) {}

  void AddRank(int64_t rank, const SavePlan::Writer& writer, const ChunkList& chunks) {
    FileLayout layout(tensors_, single_file_, sizes_);
    const size_t files_before = files_.size();
    const auto file_of_last_record = [&]() -> const std::string& {
      if (files_.size() < files_before + layout.files()) {
        const auto number = static_cast<int64_t>(files_.size() - files_before);
        const format::DataFileName name{rank, save_id_, writer.owner, false, number};
        files_.emplace_back(name.ToString(), 0);
      }
      files_.back().second = layout.size();
      return files_.back().first;
    };
    for (const auto& [fqn, size] : writer.objects) {
      const PlannedRecord place = layout.AddObject(size);
      encoder_.Record(fqn, std::nullopt, std::nullopt, file_of_last_record(), place.offset,
                      place.length);
    }
    for (const PlannedChunk& chunk : chunks) {
      const PlannedRecord place = layout.AddChunk(chunk);
      encoder_.Record(tensors_[chunk.tensor].fqn, chunk.offsets, chunks_of_tensor_[chunk.tensor]++,
                      file_of_last_record(), place.offset, place.length);
    }
  }

  // Every rank's files and their sizes; the encoder has views of the names until it is finished.
  std::vector<std::pair<std::string, int64_t>> TakeFiles() && {
    return {std::make_move_iterator(files_.begin()), std::make_move_iterator(files_.end())};
  }

 private:
  format::MetadataEncoder& encoder_;
  const std::vector<PlannedTensor>& tensors_;
  const uint64_t save_id_;
  const bool single_file_;
  RecordSizes sizes_;
  std::vector<int64_t> chunks_of_tensor_;              // so far
  std::deque<std::pair<std::string, int64_t>> files_;  // a deque does not move the names
};

}  // namespace

SavePlan::Encoded SavePlan::Encode(const EncodeRequest& request) const {
  const std::vector<ChunkList> by_rank = ChunksByRank(request.writers.size());
  const ChunksByTensor grouped = GroupByTensor(by_rank, tensors_.size());
  format::MetadataEncoder encoder(ExpectedBytes(tensors_, grouped.places.size()));
  EncodeTensors(encoder, tensors_, by_rank, grouped);
  for (const Writer& writer : request.writers) {
    for (const auto& object : writer.objects) encoder.Entry(object.first, format::BytesMetadata{});
  }
  if (request.paths == nullptr) {
    encoder.PlannerData({});
  } else {
    EncodePaths(encoder, *request.paths, tensors_, request.writers);
  }
  encoder.BeginRecords();
  RecordsEncoder records(encoder, tensors_, request.save_id, request.single_file);
  for (size_t rank = 0; rank < by_rank.size(); ++rank)
    records.AddRank(static_cast<int64_t>(rank), request.writers[rank], by_rank[rank]);
  std::string metadata = encoder.Finish(request.storage_meta, request.version);
  return {std::move(metadata), std::move(records).TakeFiles()};
}

}  // namespace hsdp_ckpt::checkpoint
