#include "hsdp/grad_reducer.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "hsdp/background.h"
#include "hsdp/grad_bucket.h"
#include "kernels/batched_copy.h"

namespace hsdp_ckpt::hsdp {
namespace {

char* At(const at::Tensor& tensor, int64_t element) {
  return static_cast<char*>(tensor.mutable_data_ptr()) +
         element * static_cast<int64_t>(tensor.element_size());
}

}  // namespace

GradReducer::GradReducer(std::string unit, std::vector<std::vector<int64_t>> sizes,
                         std::vector<GradDtypes> dtypes, at::Device device,
                         std::shared_ptr<Collectives> collectives,
                         std::shared_ptr<DeviceStreams> streams)
    : unit_(std::move(unit)),
      sizes_(std::move(sizes)),
      dtypes_(std::move(dtypes)),
      device_(device),
      collectives_(std::move(collectives)),
      streams_(std::move(streams)),
      exchanges_(!sizes_.empty() && collectives_->exchanges(device.type())),
      used_here_(sizes_.size(), false) {
  const int64_t shards = collectives_->shards();
  std::vector<std::pair<at::ScalarType, at::ScalarType>>
      kinds;  // in order of first use: the same on all ranks
  for (const GradDtypes& d : dtypes_) {
    const std::pair kind(d.computed, d.reduced);
    if (std::find(kinds.begin(), kinds.end(), kind) == kinds.end()) kinds.push_back(kind);
  }
  for (const auto& [computed, reduced] : kinds) {
    std::vector<size_t> in_place, packed;
    for (size_t i = 0; i < sizes_.size(); ++i) {
      if (dtypes_[i].computed != computed || dtypes_[i].reduced != reduced) continue;
      const auto [rows, row_size] = ParamShape::Of(sizes_[i], shards);
      const int64_t chunk = (rows + shards - 1) / shards * row_size;
      // What is cast or scaled on the way is packed in any case; a sum of exchanged pieces casts
      // and scales by itself.
      const bool as_it_is = exchanges_
                                ? Bucket::Wire(computed, reduced) == computed
                                : computed == reduced && collectives_->pre_scale(reduced) == 1.0 &&
                                      collectives_->coalesces(device.type()) && rows % shards == 0;
      const bool large = chunk * static_cast<int64_t>(c10::elementSize(computed)) >= kInPlaceBytes;
      (shards > 1 && large && as_it_is ? in_place : packed).push_back(i);
    }
    std::stable_partition(packed.begin(), packed.end(),
                          [&](size_t i) { return !sizes_[i].empty(); });
    buckets_.push_back(std::make_shared<Bucket>(computed, reduced, std::move(in_place), packed,
                                                sizes_, shards, device_, exchanges_));
  }
}

GradReducer::~GradReducer() {
  try {
    Join();
  } catch (const std::exception&) {
    // The device is gone, and what was held with it.
  }
}

void GradReducer::Pack(Bucket& bucket, const std::vector<at::Tensor>& grads) const {
  const ShardLayout& layout = bucket.layout;
  const int64_t shards = layout.shards();
  bucket.input =
      at::empty({shards * bucket.packed_stride()}, bucket.ones.options().dtype(bucket.wire));
  std::vector<kernels::CopySegment> segments;
  segments.reserve((bucket.params.size() * 2 + 2) * static_cast<size_t>(shards));
  const auto zeros = [&](int64_t offset, int64_t numel) {
    if (numel > 0) segments.push_back({nullptr, At(bucket.input, offset), numel});
  };
  for (int64_t rank = 0; rank < shards; ++rank) {
    const int64_t base = rank * bucket.packed_stride() - bucket.packed_begin;
    for (size_t p = bucket.in_place; p < bucket.params.size(); ++p) {
      const at::Tensor& grad = grads[bucket.params[p]];
      const int64_t numel = grad.defined() ? layout.shard_numel(p, rank) : 0;
      const int64_t end = p + 1 < bucket.params.size() ? layout.offset(p + 1) : layout.flat_numel();
      if (numel > 0) {
        // Every rank gets the whole gradient of a parameter without dimensions.
        const char* from =
            At(grad, grad.dim() == 0 ? 0 : layout.first_row(p, rank) * layout.param(p).row_size);
        segments.push_back({from, At(bucket.input, base + layout.offset(p)), numel});
      }
      // Padding and missing gradients: zeros, since the sum over ranks reads them.
      zeros(base + layout.offset(p) + numel, end - layout.offset(p) - numel);
    }
    int64_t flag = base + layout.flat_numel();
    for (size_t p = 0; p < bucket.params.size(); ++p, ++flag) {
      if (grads[bucket.params[p]].defined()) {
        segments.push_back({At(bucket.ones, static_cast<int64_t>(p)), At(bucket.input, flag), 1});
      } else {
        zeros(flag, 1);
      }
    }
    zeros(flag, base + bucket.stride - flag);
  }
  const double scale = exchanges_ && shards > 1 ? 1.0 : collectives_->pre_scale(bucket.reduced);
  kernels::BatchedCopy(device_, segments, bucket.computed, bucket.wire, scale);
}

// Makes the memory that other ranks' gradients come to.
void GradReducer::Receive(Bucket& bucket) const {
  const int64_t shards = collectives_->shards();
  if (shards == 1) return;
  if (!exchanges_) {
    const auto scope = streams_->Enter(DeviceStreams::Stream::kReduce);
    bucket.output = at::empty({bucket.stride}, bucket.input.options());
    return;
  }
  bucket.inbox.assign(static_cast<size_t>(shards), at::Tensor());
  for (int64_t r = 0; r < shards; ++r) {
    if (r == collectives_->shard_rank()) continue;
    bucket.inbox[static_cast<size_t>(r)] =
        at::empty({bucket.stride}, bucket.ones.options().dtype(bucket.wire));
  }
}

void GradReducer::Start(std::vector<at::Tensor> grads, const ReduceOptions& options) {
  TORCH_CHECK(stage_ == Stage::kIdle, "GradReducer: the last reduction of unit '", unit_,
              "' has not been taken");
  TORCH_CHECK(grads.size() == sizes_.size(), "GradReducer: ", grads.size(), " gradients for ",
              sizes_.size(), " parameters");
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i].defined()) continue;
    TORCH_CHECK(
        grads[i].layout() == at::kStrided, "a gradient of sizes ", grads[i].sizes(), " in unit '",
        unit_, "' is sparse; sharded parameters need dense gradients (nn.Embedding(sparse=False))");
    TORCH_CHECK(grads[i].scalar_type() == dtypes_[i].computed && grads[i].device() == device_,
                "a gradient of sizes ", grads[i].sizes(), " in unit '", unit_, "' is ",
                grads[i].scalar_type(), " on ", grads[i].device(), ", its parameter is ",
                dtypes_[i].computed, " on ", device_);
  }
  options_ = options;
  for (const auto& bucket : buckets_) {
    bucket->grads.clear();
    for (size_t p = 0; p < bucket->params.size(); ++p) {
      const size_t i = bucket->params[p];
      used_here_[i] = grads[i].defined();
      if (grads[i].defined()) grads[i] = grads[i].detach().contiguous();
      if (p >= bucket->in_place) continue;
      bucket->grads.push_back(grads[i].defined() ? grads[i].view(-1)
                                                 : at::zeros({bucket->layout.param(p).numel()},
                                                             bucket->ones.options()));
    }
    Pack(*bucket, grads);
    Receive(*bucket);
  }
  grads.clear();  // the packed ones: allocated and last used on the compute stream
  // What may run out of memory is over before the first message goes out: peers would pair up the
  // second try's with it.
  try {
    exchanges_ ? StartExchange() : StartScatter();
  } catch (const c10::DistBackendError&) {
    throw;
  } catch (const c10::Error& error) {
    C10_THROW_ERROR(DistBackendError, c10::str("a reduction that has begun failed: ",
                                               error.what_without_backtrace()));
  }
}

// Gloo on the CPU. Messages are posted here, in one order on all ranks; the rest happens beside the
// computation.
void GradReducer::StartExchange() {
  const int64_t shards = collectives_->shards(), rank = collectives_->shard_rank();
  for (const auto& bucket : buckets_) {
    if (shards == 1) continue;
    std::vector<std::vector<at::Tensor>> pieces(static_cast<size_t>(shards));
    for (int64_t r = 0; r < shards; ++r) {
      if (r != rank)
        pieces[static_cast<size_t>(r)] =
            bucket->Pieces(bucket->inbox[static_cast<size_t>(r)], rank);
    }
    bucket->works = collectives_->ExchangePieces(bucket->Runs(), pieces);
  }
  stage_ = Stage::kReduce;
  auto done = std::make_shared<std::promise<void>>();
  exchanged_ = done->get_future();
  const bool all_reduce = options_.all_reduce && collectives_->replicas() > 1;
  const auto await = [unit = unit_, collectives = collectives_](Bucket& bucket, const char* what) {
    Await(bucket.works, collectives->rank(),
          [&] { return c10::str("the ", what, " of unit '", unit, "'"); });
  };
  const auto guarded = [done](const std::function<void()>& run) {
    try {
      run();
    } catch (...) {
      done->set_exception(std::current_exception());
    }
  };
  const auto finish = [buckets = buckets_, await, done] {
    for (const auto& bucket : buckets) await(*bucket, "all-reduce over the replicas");
    done->set_value();
  };
  const auto sum = [buckets = buckets_, collectives = collectives_, await, guarded, finish, done,
                    all_reduce, shards, rank] {
    for (const auto& bucket : buckets) {
      if (shards == 1) {
        bucket->output = std::exchange(bucket->input, {});
      } else {
        await(*bucket, "reduce-scatter");
        bucket->Sum(rank, collectives->pre_scale(bucket->reduced));
      }
      bucket->AddPartial();
      if (!all_reduce) continue;
      if (collectives->replicas() == 2) {
        bucket->other = at::empty_like(bucket->output);
        bucket->works = collectives->SwapReplicas(bucket->output, bucket->other);
      } else {
        bucket->works = collectives->AllReduce(bucket->output, /*average=*/false);
      }
    }
    if (!all_reduce) return done->set_value();
    RunInBackground(Background::kReplicas, [guarded, finish] { guarded(finish); });
  };
  RunInBackground(Background::kShards, [guarded, sum] { guarded(sum); });
}

void GradReducer::StartScatter() {
  const auto scope = streams_->Enter(DeviceStreams::Stream::kReduce);
  for (const auto& bucket : buckets_) {
    if (bucket->layout.shards() == 1) {
      bucket->output = bucket->input;
      continue;
    }
    bucket->works = collectives_->ReduceScatter(
        bucket->Pieces(bucket->output, collectives_->shard_rank()), bucket->Runs(),
        !options_.divide_factor && collectives_->averages(device_.type(), bucket->reduced));
  }
  stage_ = Stage::kScatter;
  // With streams the all-reduce queues up behind on its own, unless there is work to wait for
  // (Gloo's): that is over only when peers have come, who may be waiting for a gather that this
  // rank has still to start.
  const auto queued = [](const auto& bucket) {
    return std::all_of(bucket->works.begin(), bucket->works.end(),
                       [](const auto& work) { return !work; });
  };
  if (!device_.is_cpu() && std::all_of(buckets_.begin(), buckets_.end(), queued)) StartAllReduce();
}

void GradReducer::StartAllReduce() {
  const auto scope = streams_->Enter(DeviceStreams::Stream::kReduce);
  for (const auto& bucket : buckets_) {
    Await(bucket->works, collectives_->rank(),
          [&] { return "the reduce-scatter of unit '" + unit_ + "'"; });
    if (device_.is_cpu()) {
      bucket->grads.clear();
      bucket->input.reset();
    }
    bucket->AddPartial();
  }
  // Before the all-reduces: replicas may be far away, and nobody should wait for them to give
  // memory back.
  if (!device_.is_cpu() && collectives_->shards() > 1) HoldInputs();
  for (const auto& bucket : buckets_) {
    const bool is_last = options_.all_reduce || collectives_->replicas() == 1;
    if (is_last && collectives_->replicas() > 1) {
      bucket->works = collectives_->AllReduce(
          bucket->output,
          !options_.divide_factor && collectives_->averages(device_.type(), bucket->reduced));
    }
    if (device_.is_cpu()) continue;
    Await(bucket->works, collectives_->rank(),
          [&] { return "the all-reduce of unit '" + unit_ + "'"; });
    // An all-reduce leaves the same bits on all ranks. A ring's reduce-scatter does not: it sums
    // the gradient of a parameter without dimensions for each rank in another order, beginning with
    // its neighbour's.
    const at::Tensor whole = bucket->WholeOf(bucket->output);
    if (!is_last || whole.numel() == 0 || collectives_->shards() == 1) continue;
    bucket->works = collectives_->BroadcastFirst(whole);
    Await(bucket->works, collectives_->rank(),
          [&] { return "the broadcast of unit '" + unit_ + "'"; });
  }
  stage_ = Stage::kReduce;
}

bool GradReducer::Advance(bool wait) {
  // Works that are over are waited for all the same: it rethrows what went wrong.
  const auto over = [&] {
    for (const auto& bucket : buckets_) {
      const auto& works = bucket->works;
      if (!wait && !std::all_of(works.begin(), works.end(),
                                [](const auto& w) { return !w || w->isCompleted(); }))
        return false;
    }
    for (const auto& bucket : buckets_) {
      if (bucket->works.empty()) continue;
      const auto scope = streams_->Enter(DeviceStreams::Stream::kReduce);
      Await(bucket->works, collectives_->rank(),
            [&] { return "the reduction of unit '" + unit_ + "'"; });
    }
    return true;
  };
  try {
    if (stage_ == Stage::kReduce && exchanges_) {
      if (!wait && exchanged_.wait_for(std::chrono::seconds(0)) != std::future_status::ready)
        return false;
      exchanged_.get();
      stage_ = Stage::kDone;
    }
    if (stage_ == Stage::kScatter) {
      if (!over()) return false;
      StartAllReduce();
    }
    if (stage_ == Stage::kReduce) {
      if (!over()) return false;
      stage_ = Stage::kDone;
    }
  } catch (...) {
    for (const auto& bucket : buckets_) bucket->Clear();
    stage_ = Stage::kIdle;
    throw;
  }
  return stage_ == Stage::kDone;
}

bool GradReducer::Keep() {
  if (stage_ != Stage::kDone || options_.all_reduce || collectives_->replicas() == 1) return false;
  const auto scope = streams_->Enter(DeviceStreams::Stream::kReduce);
  for (const auto& bucket : buckets_) {
    bucket->partial = std::exchange(bucket->output, {});
    streams_->Uses(
        bucket->partial);  // of one shard it is the packed input, which is the compute stream's
  }
  written_ = streams_->Record(DeviceStreams::Stream::kReduce);
  if (!device_.is_cpu()) HoldInputs();
  stage_ = Stage::kIdle;
  return true;
}

bool GradReducer::has_partial() const {
  if (stage_ != Stage::kIdle && !options_.all_reduce && collectives_->replicas() > 1) return true;
  return std::any_of(buckets_.begin(), buckets_.end(),
                     [](const auto& bucket) { return bucket->partial.defined(); });
}

void GradReducer::DropPartial() {
  for (const auto& bucket : buckets_) bucket->partial.reset();
}

std::vector<size_t> GradReducer::Unused() const {
  std::vector<size_t> unused;
  if (std::find(used_here_.begin(), used_here_.end(), false) == used_here_.end()) return unused;
  const auto scope = streams_->Enter(DeviceStreams::Stream::kReduce);
  for (const auto& bucket : buckets_) {
    at::Tensor used = bucket->FlagsOf(bucket->output).ne(0);
    if (bucket->other.defined()) used = used.logical_or(bucket->FlagsOf(bucket->other).ne(0));
    used = used.cpu();
    for (size_t p = 0; p < bucket->params.size(); ++p) {
      if (!used.const_data_ptr<bool>()[p]) unused.push_back(bucket->params[p]);
    }
  }
  return unused;
}

std::vector<at::Tensor> GradReducer::EmptyShards() const {
  std::vector<at::Tensor> shards(sizes_.size());
  for (size_t first = 0; first < sizes_.size(); ++first) {
    if (shards[first].defined()) continue;
    std::vector<size_t> params;
    std::vector<ParamShape> shapes;
    for (size_t i = first; i < sizes_.size(); ++i) {
      if (dtypes_[i].sharded != dtypes_[first].sharded) continue;
      params.push_back(i);
      shapes.push_back(ParamShape::Of(sizes_[i], collectives_->shards()));
    }
    const auto item = static_cast<int64_t>(c10::elementSize(dtypes_[first].sharded));
    const ShardLayout layout(std::move(shapes), collectives_->shards(),
                             std::max<int64_t>(1, 16 / item));
    const auto options = at::TensorOptions(dtypes_[first].sharded).device(device_);
    const at::Tensor buffer = at::empty({layout.flat_numel()}, options);
    for (size_t p = 0; p < params.size(); ++p) {
      const int64_t rank = collectives_->shard_rank();
      shards[params[p]] = buffer.narrow(0, layout.offset(p), layout.shard_numel(p, rank))
                              .view(ShardSizes(sizes_[params[p]], layout.shard_rows(p, rank)));
    }
  }
  return shards;
}

double GradReducer::PostScale(const Bucket& bucket) const {
  if (bucket.is_average) return 1.0;
  if (!options_.divide_factor && !exchanges_ &&
      collectives_->averages(device_.type(), bucket.reduced))
    return 1.0;
  const auto ranks = static_cast<double>(collectives_->shards() * collectives_->replicas());
  return 1.0 / (collectives_->pre_scale(bucket.reduced) * options_.divide_factor.value_or(ranks));
}

void GradReducer::CallHook(Bucket& bucket) {
  if (!options_.all_reduce_hook) return;
  if (bucket.other.defined()) bucket.output.add_(std::exchange(bucket.other, {}));
  const at::Tensor averages = bucket.output.narrow(0, 0, bucket.layout.flat_numel());
  if (const double scale = PostScale(bucket); scale != 1.0) averages.mul_(scale);
  bucket.is_average = true;
  options_.all_reduce_hook(averages);
}

void GradReducer::Write(const std::vector<std::optional<at::Tensor>>& targets,
                        const std::vector<bool>& accumulate) {
  TORCH_CHECK(stage_ == Stage::kDone, "GradReducer: nothing has been reduced");
  TORCH_CHECK(targets.size() == sizes_.size() && accumulate.size() == sizes_.size(),
              "GradReducer: ", targets.size(), " targets for ", sizes_.size(), " parameters");
  const auto scope = streams_->Enter(DeviceStreams::Stream::kReduce);
  for (const auto& bucket : buckets_) {
    CallHook(*bucket);
    const ShardLayout& layout = bucket->layout;
    // One fused pass for each dtype of the targets, and for those that are added to.
    std::vector<size_t> left(bucket->params.size());
    for (size_t p = 0; p < left.size(); ++p) left[p] = p;
    std::erase_if(left, [&](size_t p) { return !targets[bucket->params[p]].has_value(); });
    while (!left.empty()) {
      const size_t like = bucket->params[left.front()];
      std::vector<kernels::CopySegment> copies;
      std::vector<kernels::SumSegment> sums;
      std::erase_if(left, [&](size_t p) {
        const size_t i = bucket->params[p];
        if (dtypes_[i].sharded != dtypes_[like].sharded || accumulate[i] != accumulate[like])
          return false;
        const at::Tensor& target = *targets[i];
        const int64_t numel = layout.shard_numel(p, collectives_->shard_rank()),
                      offset = layout.offset(p);
        TORCH_CHECK(target.numel() == numel && target.scalar_type() == dtypes_[i].sharded &&
                        target.is_contiguous(),
                    "GradReducer: the gradient of parameter ", i, " of unit '", unit_, "' is ",
                    target.scalar_type(), " ", target.sizes(), "; expected ", numel,
                    " contiguous elements of ", dtypes_[i].sharded);
        streams_->Uses(target);
        if (numel == 0) return true;
        if (bucket->other.defined()) {
          sums.push_back({{At(bucket->output, offset), At(bucket->other, offset)},
                          target.mutable_data_ptr(),
                          numel});
        } else {
          copies.push_back({At(bucket->output, offset), target.mutable_data_ptr(), numel});
        }
        return true;
      });
      const at::ScalarType to = dtypes_[like].sharded;
      kernels::BatchedSum(sums, bucket->reduced, to, PostScale(*bucket), accumulate[like]);
      kernels::BatchedCopy(device_, copies, bucket->reduced, to, PostScale(*bucket),
                           accumulate[like]);
    }
  }
  written_ = streams_->Record(DeviceStreams::Stream::kReduce);
  Drop();
}

// What the compute stream has allocated and the reduce stream reads goes back in ReleaseInputs,
// when the one has waited for the other. Left to the allocator, it would go back when the host
// finds that both have passed: the host is a whole backward ahead, and all gradients of the model
// would be held at once.
void GradReducer::HoldInputs() {
  const size_t before = held_.size();
  for (const auto& bucket : buckets_) {
    held_.insert(held_.end(), bucket->grads.begin(), bucket->grads.end());
    if (bucket->input.defined()) held_.push_back(bucket->input);
    bucket->grads.clear();
    bucket->input.reset();
  }
  if (held_.size() > before) read_ = streams_->Record(DeviceStreams::Stream::kReduce);
}

void GradReducer::Drop() {
  if (stage_ == Stage::kScatter || stage_ == Stage::kReduce) Advance(true);
  if (!device_.is_cpu()) HoldInputs();  // of one shard: the result, up to now
  for (const auto& bucket : buckets_) bucket->Clear();
  stage_ = Stage::kIdle;
}

void GradReducer::ReleaseInputs() {
  streams_->Join(std::exchange(read_, nullptr).get());
  for (const at::Tensor& tensor : std::exchange(held_, {})) streams_->Uses(tensor);
}

void GradReducer::Join() {
  streams_->Join(std::exchange(written_, nullptr).get());
  ReleaseInputs();
}

}  // namespace hsdp_ckpt::hsdp
