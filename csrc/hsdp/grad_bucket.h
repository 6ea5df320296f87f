#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "hsdp/collectives.h"
#include "hsdp/shard_layout.h"

namespace hsdp_ckpt::hsdp {

/// One trainable parameter's gradient, and the dtypes it goes through.
struct GradSpec {
  CutSizes cut;             ///< of the full gradient
  at::ScalarType computed;  ///< as autograd leaves it
  at::ScalarType reduced;   ///< as it is summed, over the ranks and, if so asked, over backwards
  at::ScalarType sharded;   ///< as the sharded gradient has it
};

/// The gradients of one unit that are computed in one dtype and reduced in one: their layout, and
/// their buffers while a reduction is under way.
///
/// What one rank gets are `stride` elements: the shards of the parameters that are reduced in
/// place, those of the packed ones (from `packed_begin` on; last, from `whole_begin` on, those
/// without dimensions), one flag per parameter, padding. A flag is 1 where this rank has a
/// gradient: after the reduction it says whether anybody had one. The packed input holds the part
/// from `packed_begin` on, once a rank.
struct GradBucket {
  at::ScalarType computed, reduced;
  bool exchanges;              ///< ranks send pieces point to point; if not, they call collectives
  at::ScalarType given;        ///< what the gradients are in, see Expect
  at::ScalarType wire;         ///< what is sent
  double pack_scale;           ///< what gradients are multiplied with when they are packed
  std::vector<size_t> params;  ///< indices among the unit's trainable parameters
  size_t in_place;             ///< so many of `params`, the first ones, go from where they are
  ShardLayout layout;
  int64_t packed_begin, whole_begin, stride;
  at::Tensor ones;         ///< one for each parameter, in the dtype `given`
  const CustomComm* comm;  ///< its buffers' memory is this one's

  // While a reduction is under way.
  std::vector<at::Tensor> grads{};  ///< of the parameters reduced in place, one dimension each
  at::Tensor input{};               ///< packed
  std::vector<at::Tensor> inbox{};  ///< by rank, where ranks exchange pieces
  at::Tensor output{};
  bool is_average = false;  ///< `output` has been divided already
  at::Tensor other{};       ///< the other replica's output, to be added
  PendingWorks works{};

  at::Tensor partial{};  ///< sums over the shards that wait for an all-reduce; outlives a reduction

  int64_t packed_stride() const { return stride - packed_begin; }
  /// The gradients of parameters without dimensions, which every rank of the shard group gets
  /// whole: the last ones of what one rank gets.
  at::Tensor WholeOf(const at::Tensor& buffer) const {
    return buffer.narrow(0, whole_begin, layout.flat_numel() - whole_begin);
  }
  at::Tensor FlagsOf(const at::Tensor& buffer) const {
    return buffer.narrow(0, layout.flat_numel(), static_cast<int64_t>(params.size()));
  }
};

using GradBuckets = std::vector<std::shared_ptr<GradBucket>>;

/// Who sends the gradients of a bucket: collectives, ranks that exchange pieces point to point, or
/// a user's hook.
enum class SentBy : uint8_t { kCollectives, kPieces, kHook };

/// The buckets of one unit, in the same order on all ranks. Large gradients are reduced from where
/// autograd has left them, small ones through one packed buffer for each pair of dtypes; what a
/// hook sends is packed.
GradBuckets MakeBuckets(const std::vector<GradSpec>& specs, const Collectives& collectives,
                        at::Device device, SentBy sent_by);
/// Who does where there is no hook.
SentBy SenderOf(const Collectives& collectives, at::Device device);

/// What the next reduction's gradients are in: `computed`, or `reduced` where they have waited for
/// it and were added up meanwhile. The same on all ranks, as it decides on what is sent.
enum class GradForm { kComputed, kReduced };

/// Makes `bucket` ready for gradients of `form`. No effect if it is.
void Expect(GradBucket& bucket, GradForm form);
/// Takes this rank's gradients (by trainable parameter; undefined where it has none) into `bucket`:
/// those reduced in place as they are, the others packed. Zeros stand for missing ones.
void Pack(GradBucket& bucket, const std::vector<at::Tensor>& grads);
/// The runs that are cut among the ranks, in the wire's dtype.
std::vector<Cut> Runs(const GradBucket& bucket);
/// The piece of every run that `rank` gets, in a buffer of `stride` elements.
std::vector<at::Tensor> Pieces(const GradBucket& bucket, const at::Tensor& buffer, int64_t rank);
/// Adds to `output` the sums over the shards that have waited for this all-reduce, and gives them
/// up. A device still reads what is returned.
at::Tensor AddPartial(GradBucket& bucket);
/// Forgets the buffers of a reduction; partial sums stay.
void Clear(GradBucket& bucket);

/// The address of one element of a contiguous tensor.
inline char* At(const at::Tensor& tensor, int64_t element) {
  return static_cast<char*>(tensor.mutable_data_ptr()) +
         element * static_cast<int64_t>(tensor.element_size());
}

}  // namespace hsdp_ckpt::hsdp
