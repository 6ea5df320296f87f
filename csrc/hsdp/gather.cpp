#include "hsdp/gather.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "kernels/batched_copy.h"

namespace hsdp_ckpt::hsdp {
namespace {

constexpr int64_t kShardAlignment = 16;  // bytes, for vector loads and the record format

uint8_t* Bytes(const at::Tensor& tensor) {
  return static_cast<uint8_t*>(tensor.mutable_data_ptr());
}

}  // namespace

Shards PlanShards(std::shared_ptr<Collectives> collectives,
                  const std::vector<GatheredParam>& params, c10::DeviceType device) {
  Shards shards;
  shards.collectives = std::move(collectives);
  shards.is_full = shards.count() == 1;
  std::vector<ParamShape> shapes;
  for (const GatheredParam& param : params) {
    const auto item = static_cast<int64_t>(c10::elementSize(param.stored));
    shapes.push_back(ParamShape::Of(param.cut, shards.count(), item));
    shards.is_full = shards.is_full && param.full == param.stored;
  }
  shards.layout.emplace(std::move(shapes), shards.count(), kShardAlignment,
                        FlatOrder(params, *shards.collectives, device));
  shards.plan = PlanGather(params, *shards.layout, *shards.collectives, device);
  return shards;
}

uint8_t* ShardAddress(const Shards& shards, size_t i) {
  return Bytes(shards.flat) + shards.layout->offset(i);
}

void Gather::Allocate(const Shards& shards) {
  shards_ = &shards;
  const GatherPlan& plan = shards.plan;
  const bool is_empty = std::all_of(plan.full_bytes.begin(), plan.full_bytes.end(),
                                    [](int64_t bytes) { return bytes == 0; });
  if (shards.is_full || is_empty) return;
  if (kept_of_ == shards_) full_ = std::exchange(kept_, {});
  full_.resize(plan.full_bytes.size());
  kept_of_ = nullptr;
  AllocateFull(/*gathered_into=*/true);
  const int64_t packed_bytes = shards.count() * plan.packed_stride;
  if (packed_bytes > 0) packed_ = EmptyPacked(packed_bytes);
  const bool is_here = shards.flat.device() == device_;
  flat_ = is_here ? shards.flat : at::empty({shards.flat.numel()}, ThisDevice());
}

at::Tensor Gather::EmptyPacked(int64_t bytes) const {
  const at::ScalarType dtype = shards_->plan.packed_dtype;
  const at::TensorOptions options = ThisDevice().dtype(dtype);
  const auto item = static_cast<int64_t>(c10::elementSize(dtype));
  return shards_->collectives->gather_comm().Empty(bytes / item, options).view(at::kByte);
}

void Gather::Send(const std::function<void()>& beside) {
  if (!has_memory() && !beside) return;
  const auto scope = streams_->Enter(DeviceStreams::Side::kGather);
  if (has_memory()) {
    if (!flat_.is_same(shards_->flat)) flat_.copy_(shards_->flat, /*non_blocking=*/true);
    Run(shards_->plan.own_rows, flat_);
    if (shards_->count() > 1) AllGather();
  }
  if (beside) beside();
  std::vector<WorkPtr> works;
  works_.MoveQueuedTo(works);
  streams_->Record(DeviceStreams::Side::kGather, gathered_, std::move(works));
}

// Gloo's works are waited for at their use, on CUDA too: a peer may have to take part in a
// reduction of ours first.
void Gather::AllGather() {
  const GatherPlan& plan = shards_->plan;
  std::vector<at::Tensor> own;
  std::vector<Cut> runs;
  const auto add = [&](Cut cut, std::optional<int64_t> flat_offset) {
    const at::Tensor in_place = cut.piece(shards_->rank());
    own.push_back(flat_offset ? flat_.narrow(0, *flat_offset, in_place.numel()) : in_place);
    runs.push_back(std::move(cut));
  };
  for (const InPlaceRun& run : plan.in_place) {
    const at::Tensor& buffer = full_[run.place.buffer];
    add({buffer.narrow(0, run.place.offset, run.bounds.back()), run.bounds}, run.flat_offset);
  }
  if (packed_.defined()) {
    Cut packed{packed_, {}};
    for (int64_t r = 0; r <= shards_->count(); ++r) packed.bounds.push_back(r * plan.packed_stride);
    add(std::move(packed), plan.packed_flat_offset);
  }
  works_ = shards_->collectives->AllGather(own, runs, plan.packed_dtype);
}

void Gather::Join(const std::string& unit) {
  if (shards_ == nullptr) return;
  Await(works_, shards_->collectives->rank(),
        [&unit] { return "the all-gather of unit '" + unit + "'"; });
  streams_->Join(gathered_);
  for (const at::Tensor& buffer : full_) streams_->Uses(buffer);
  streams_->Uses(packed_);
  if (!flat_.is_same(shards_->flat)) streams_->Uses(flat_);
}

void Gather::Unpack() {
  if (has_memory()) AllocateFull(/*gathered_into=*/false);
  if (packed_.defined()) Run(shards_->plan.unpack, packed_);
  packed_.reset();
  flat_.reset();
}

std::pair<at::Tensor, int64_t> Gather::PlaceOf(size_t i) const {
  const auto [buffer, offset] = shards_->plan.places[i];
  return {full_[buffer], offset};
}

bool Gather::IsFreedAlone(size_t i) const {
  return has_memory() && shards_->plan.places[i].buffer != 0;
}

void Gather::FreeOne(size_t i) { full_[shards_->plan.places[i].buffer].reset(); }

void Gather::Free(bool keep) {
  packed_.reset();
  flat_.reset();
  if (keep && has_memory()) {
    kept_of_ = shards_;
    kept_ = full_;
  } else if (!keep) {
    kept_of_ = nullptr;
    kept_.clear();
  }
  full_.clear();  // to the compute stream, which has used them last
  shards_ = nullptr;
}

void Gather::AllocateFull(bool gathered_into) {
  for (size_t b = 0; b < full_.size(); ++b) {
    if (shards_->plan.is_gathered_into[b] != gathered_into) continue;
    const bool is_kept = full_[b].defined() && full_[b].numel() == shards_->plan.full_bytes[b];
    if (!is_kept) full_[b] = at::empty({shards_->plan.full_bytes[b]}, ThisDevice());
  }
}

void Gather::Run(const std::vector<Move>& moves, const at::Tensor& from) const {
  std::vector<kernels::CopySegment> segments;
  segments.reserve(moves.size());
  for (auto move = moves.begin(); move != moves.end(); ++move) {
    const uint8_t* const source = move->from == Move::kZeros ? nullptr : Bytes(from) + move->from;
    const at::Tensor& to = move->target == Move::kPacked ? packed_ : full_[move->target];
    segments.push_back(
        {source, Bytes(to) + move->to, move->numel, move->runs, move->numel, move->stride});
    const auto next = std::next(move);
    if (next != moves.end() && next->src == move->src && next->dst == move->dst) continue;
    kernels::BatchedCopy(device_, segments, move->src, move->dst);
    segments.clear();
  }
}

}  // namespace hsdp_ckpt::hsdp
