#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "hsdp/collectives.h"
#include "hsdp/grad_reducer.h"
#include "hsdp/shard_layout.h"

namespace hsdp_ckpt::hsdp {

/// The gradients of one unit that are computed in one dtype and reduced in one: their layout, and
/// their buffers while a reduction is under way.
///
/// What one rank gets, `stride` elements: the shards of the parameters that are reduced in place,
/// those of the packed ones (from `packed_begin` on; last, from `whole_begin` on, those without
/// dimensions), one flag per parameter, padding. The packed input holds the part from
/// `packed_begin` on, once a rank.
struct GradReducer::Bucket {
  Bucket(at::ScalarType computed, at::ScalarType reduced, std::vector<size_t> in_place,
         const std::vector<size_t>& packed, const std::vector<std::vector<int64_t>>& sizes,
         int64_t shards, at::Device device, bool exchanges);

  int64_t packed_stride() const { return stride - packed_begin; }
  /// The gradients of parameters without dimensions, which every rank of the shard group gets
  /// whole: the last ones of what one rank gets.
  at::Tensor WholeOf(const at::Tensor& buffer) const {
    return buffer.narrow(0, whole_begin, layout.flat_numel() - whole_begin);
  }
  at::Tensor FlagsOf(const at::Tensor& buffer) const {
    return buffer.narrow(0, layout.flat_numel(), static_cast<int64_t>(params.size()));
  }
  /// What is sent where ranks exchange pieces: the gradients as they are, if the sums can hold
  /// every value of them.
  static at::ScalarType Wire(at::ScalarType computed, at::ScalarType reduced);
  /// The runs that are cut among the ranks, in the wire's dtype.
  std::vector<Cut> Runs() const;
  /// A piece of every run, in a buffer of `stride` elements.
  std::vector<at::Tensor> Pieces(const at::Tensor& buffer, int64_t rank) const;
  /// output = scale * the sum over the ranks, whose pieces are in `inbox`; this rank's are taken
  /// from where they are. Frees the gradients.
  void Sum(int64_t rank, double scale);

  /// Adds, and forgets, the sums over the shards that have waited for this all-reduce.
  void AddPartial();
  /// Forgets the buffers of a reduction; partial sums stay.
  void Clear();

  const at::ScalarType computed, reduced;
  const at::ScalarType wire;  // what is sent
  const std::vector<size_t> params;
  const size_t in_place;  // so many of `params`, the first ones, go from where they are
  const ShardLayout layout;
  int64_t packed_begin, whole_begin, stride;
  at::Tensor ones;

  std::vector<at::Tensor> grads;  // of the parameters that are reduced in place, one dimension
  at::Tensor input;               // packed
  std::vector<at::Tensor> inbox;  // by rank
  at::Tensor output;
  bool is_average = false;  // `output` has been divided already
  at::Tensor other;         // the other replica's output, to be added
  at::Tensor partial;       // sums over the shards that wait for an all-reduce
  Collectives::Works works;
};

}  // namespace hsdp_ckpt::hsdp
