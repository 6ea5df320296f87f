#include "hsdp/grad_bucket.h"

#include <algorithm>
#include <utility>

#include "kernels/batched_copy.h"

namespace hsdp_ckpt::hsdp {
namespace {

constexpr int64_t kAlignment = 16;  // bytes

/// The two dtypes that the gradients of a bucket have in common.
struct DtypePair {
  at::ScalarType computed, reduced;
  friend bool operator==(const DtypePair&, const DtypePair&) = default;
};

/// What is sent where ranks exchange pieces: the gradients as they are, if the sums can hold every
/// value of them.
at::ScalarType ExchangedDtype(DtypePair dtypes) {
  const auto [computed, reduced] = dtypes;
  const bool holds = reduced == computed || reduced == at::kDouble ||
                     (reduced == at::kFloat && computed != at::kDouble);
  return holds ? computed : reduced;
}

// In the order of first use, which is the same on all ranks.
std::vector<DtypePair> PairsOf(const std::vector<GradSpec>& specs) {
  std::vector<DtypePair> pairs;
  for (const GradSpec& spec : specs) {
    const DtypePair pair{spec.computed, spec.reduced};
    if (std::find(pairs.begin(), pairs.end(), pair) == pairs.end()) pairs.push_back(pair);
  }
  return pairs;
}

// Whether a gradient may be reduced from where it is. One that is cast or scaled on the way is
// packed in any case; a sum of exchanged pieces casts and scales by itself.
bool GoesInPlace(const GradSpec& spec, const Collectives& collectives, at::Device device,
                 SentBy sent_by) {
  const int64_t shards = collectives.shards();
  const auto item = static_cast<int64_t>(c10::elementSize(spec.computed));
  const ParamShape shape = ParamShape::Of(spec.cut, shards, item);
  if (shards == 1 || shape.runs > 1 || sent_by == SentBy::kHook) return false;
  if (sent_by == SentBy::kPieces) {
    return base::ChunkRows(shape.rows, shards) * shape.row_size >= kInPlaceBytes &&
           ExchangedDtype({spec.computed, spec.reduced}) == spec.computed;
  }
  return shape.numel() >= kInPlaceOnStreams && spec.computed == spec.reduced &&
         collectives.pre_scale(spec.reduced) == 1.0 &&
         collectives.coalesces_reductions(device.type()) && base::CutsEvenly(shape.rows, shards);
}

int64_t AlignmentOf(DtypePair dtypes) {
  const size_t item = std::min(c10::elementSize(dtypes.computed), c10::elementSize(dtypes.reduced));
  return kAlignment / static_cast<int64_t>(item);
}

/// A bucket's parameters: those that go in place, and the packed ones, without dimensions last.
struct Members {
  std::vector<size_t> in_place, packed;
};

Members MembersOf(DtypePair dtypes, const std::vector<GradSpec>& specs,
                  const Collectives& collectives, at::Device device, SentBy sent_by) {
  Members members;
  for (size_t i = 0; i < specs.size(); ++i) {
    if (DtypePair{specs[i].computed, specs[i].reduced} != dtypes) continue;
    const bool in_place = GoesInPlace(specs[i], collectives, device, sent_by);
    (in_place ? members.in_place : members.packed).push_back(i);
  }
  std::stable_partition(members.packed.begin(), members.packed.end(),
                        [&](size_t i) { return specs[i].cut.is_cut(); });
  return members;
}

ShardLayout LayoutOf(const std::vector<size_t>& params, const std::vector<GradSpec>& specs,
                     int64_t shards, int64_t alignment) {
  std::vector<ParamShape> shapes;
  for (const size_t i : params) shapes.push_back(ParamShape::Of(specs[i].cut, shards));
  return {std::move(shapes), shards, alignment};
}

GradBucket MakeBucket(DtypePair dtypes, const Members& members, const std::vector<GradSpec>& specs,
                      const Collectives& collectives, at::Device device, SentBy sent_by) {
  const int64_t shards = collectives.shards();
  const bool exchanges = sent_by == SentBy::kPieces;
  const bool scales = sent_by == SentBy::kCollectives;
  std::vector<size_t> params = members.in_place;
  params.insert(params.end(), members.packed.begin(), members.packed.end());
  const int64_t alignment = AlignmentOf(dtypes);
  ShardLayout layout = LayoutOf(params, specs, shards, alignment);
  const auto offset_of = [&](size_t p) {
    return p < params.size() ? layout.offset(p) : layout.flat_numel();
  };
  const auto whole =
      std::find_if(params.begin(), params.end(), [&](size_t i) { return !specs[i].cut.is_cut(); });
  const auto flags = static_cast<int64_t>(params.size());
  const int64_t padded_flags = (flags + alignment - 1) / alignment * alignment;
  const int64_t packed_begin = offset_of(members.in_place.size());
  const int64_t whole_begin = offset_of(static_cast<size_t>(whole - params.begin()));
  const int64_t stride = layout.flat_numel() + padded_flags;
  return GradBucket{
      .computed = dtypes.computed,
      .reduced = dtypes.reduced,
      .exchanges = exchanges,
      .given = dtypes.computed,
      .wire = exchanges ? ExchangedDtype(dtypes) : dtypes.reduced,
      .pack_scale = scales ? collectives.pre_scale(dtypes.reduced) : 1.0,
      .params = std::move(params),
      .in_place = members.in_place.size(),
      .layout = std::move(layout),
      .packed_begin = packed_begin,
      .whole_begin = whole_begin,
      .stride = stride,
      .ones = at::ones({flags}, at::TensorOptions(dtypes.computed).device(device)),
      .comm = &collectives.reduce_comm(),
  };
}

/// Collects the segments that fill a bucket's packed input.
class Packer {
 public:
  Packer(GradBucket& bucket, const std::vector<at::Tensor>& grads)
      : bucket_(bucket), layout_(bucket.layout), grads_(grads) {
    segments_.reserve((bucket.params.size() * 2 + 2) * static_cast<size_t>(layout_.shards()));
  }

  std::vector<kernels::CopySegment> Segments() {
    for (int64_t rank = 0; rank < layout_.shards(); ++rank) {
      const int64_t base = rank * bucket_.packed_stride() - bucket_.packed_begin;
      for (size_t p = bucket_.in_place; p < bucket_.params.size(); ++p) AddShard(p, rank, base);
      AddFlags(base);
    }
    return std::move(segments_);
  }

 private:
  void AddZeros(int64_t offset, int64_t numel) {
    if (numel > 0) segments_.push_back({nullptr, At(bucket_.input, offset), numel});
  }

  // Padding and missing gradients are zeros, since the sum over ranks reads them.
  void AddShard(size_t p, int64_t rank, int64_t base) {
    const at::Tensor& grad = grads_[bucket_.params[p]];
    const int64_t numel = grad.defined() ? layout_.shard_numel(p, rank) : 0;
    const int64_t begin = layout_.offset(p);
    const int64_t end =
        p + 1 < bucket_.params.size() ? layout_.offset(p + 1) : layout_.flat_numel();
    if (numel > 0) {
      const ShardPlace place = layout_.place(p, rank);
      // Every rank gets the whole gradient of a parameter without dimensions.
      const int64_t first = grad.dim() == 0 ? 0 : place.first;
      segments_.push_back({At(grad, first), At(bucket_.input, base + begin), place.run, place.runs,
                           place.stride, place.run});
    }
    AddZeros(base + begin + numel, end - begin - numel);
  }

  void AddFlags(int64_t base) {
    int64_t flag = base + layout_.flat_numel();
    for (size_t p = 0; p < bucket_.params.size(); ++p, ++flag) {
      if (grads_[bucket_.params[p]].defined()) {
        const char* one = At(bucket_.ones, static_cast<int64_t>(p));
        segments_.push_back({one, At(bucket_.input, flag), 1});
      } else {
        AddZeros(flag, 1);
      }
    }
    AddZeros(flag, base + bucket_.stride - flag);
  }

  const GradBucket& bucket_;
  const ShardLayout& layout_;
  const std::vector<at::Tensor>& grads_;
  std::vector<kernels::CopySegment> segments_;
};

}  // namespace

GradBuckets MakeBuckets(const std::vector<GradSpec>& specs, const Collectives& collectives,
                        at::Device device, SentBy sent_by) {
  GradBuckets buckets;
  for (const DtypePair dtypes : PairsOf(specs)) {
    const Members members = MembersOf(dtypes, specs, collectives, device, sent_by);
    buckets.push_back(std::make_shared<GradBucket>(
        MakeBucket(dtypes, members, specs, collectives, device, sent_by)));
  }
  return buckets;
}

SentBy SenderOf(const Collectives& collectives, at::Device device) {
  const bool exchanges =
      collectives.shards() > 1 && collectives.exchanges_reductions(device.type());
  return exchanges ? SentBy::kPieces : SentBy::kCollectives;
}

// A gradient that goes in place has the wire's dtype in either form.
void Expect(GradBucket& bucket, GradForm form) {
  const at::ScalarType given = form == GradForm::kReduced ? bucket.reduced : bucket.computed;
  if (given == bucket.given) return;
  bucket.given = given;
  bucket.wire = bucket.exchanges ? ExchangedDtype({given, bucket.reduced}) : bucket.reduced;
  bucket.ones = bucket.ones.to(given);
}

void Pack(GradBucket& bucket, const std::vector<at::Tensor>& grads) {
  bucket.grads.clear();
  for (size_t p = 0; p < bucket.in_place; ++p) {
    const at::Tensor& grad = grads[bucket.params[p]];
    const int64_t numel = bucket.layout.param(p).numel();
    bucket.grads.push_back(grad.defined() ? grad.view(-1)
                                          : at::zeros({numel}, bucket.ones.options()));
  }
  const int64_t numel = bucket.layout.shards() * bucket.packed_stride();
  bucket.input = bucket.comm->Empty(numel, bucket.ones.options().dtype(bucket.wire));
  kernels::BatchedCopy(bucket.ones.device(), Packer(bucket, grads).Segments(), bucket.given,
                       bucket.wire, bucket.pack_scale);
}

std::vector<Cut> Runs(const GradBucket& bucket) {
  const ShardLayout& layout = bucket.layout;
  std::vector<Cut> runs;
  for (size_t p = 0; p < bucket.in_place; ++p) {
    Cut& cut = runs.emplace_back(Cut{bucket.grads[p], {}});
    for (int64_t r = 0; r <= layout.shards(); ++r) {
      cut.bounds.push_back(layout.first_row(p, r) * layout.param(p).row_size);
    }
  }
  Cut& packed = runs.emplace_back(Cut{bucket.input, {}});
  for (int64_t r = 0; r <= layout.shards(); ++r)
    packed.bounds.push_back(r * bucket.packed_stride());
  return runs;
}

std::vector<at::Tensor> Pieces(const GradBucket& bucket, const at::Tensor& buffer, int64_t rank) {
  const ShardLayout& layout = bucket.layout;
  std::vector<at::Tensor> pieces;
  for (size_t p = 0; p < bucket.in_place; ++p) {
    pieces.push_back(buffer.narrow(0, layout.offset(p), layout.shard_numel(p, rank)));
  }
  pieces.push_back(buffer.narrow(0, bucket.packed_begin, bucket.packed_stride()));
  return pieces;
}

at::Tensor AddPartial(GradBucket& bucket) {
  at::Tensor partial = std::exchange(bucket.partial, {});
  if (!partial.defined()) return partial;
  const kernels::CopySegment all{partial.const_data_ptr(), bucket.output.mutable_data_ptr(),
                                 bucket.stride};
  kernels::BatchedCopy(bucket.output.device(), {&all, 1}, bucket.reduced, bucket.reduced, 1.0,
                       /*accumulate=*/true);
  return partial;
}

void Clear(GradBucket& bucket) {
  bucket.grads.clear();
  bucket.inbox.clear();
  bucket.works = {};
  bucket.input.reset();
  bucket.output.reset();
  bucket.other.reset();
  bucket.is_average = false;
}

}  // namespace hsdp_ckpt::hsdp
