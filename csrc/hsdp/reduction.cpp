#include "hsdp/reduction.h"

namespace hsdp_ckpt::hsdp {

void Reduction::Start(const ReduceOptions& options) {
  options_ = options;
  try {
    Begin();
  } catch (const c10::DistBackendError&) {
    throw;
  } catch (const c10::Error& error) {
    C10_THROW_ERROR(DistBackendError, c10::str("a reduction that has begun failed: ",
                                               error.what_without_backtrace()));
  }
}

bool Reduction::Advance(bool wait) {
  try {
    MoveOn(wait);
  } catch (...) {
    for (const auto& bucket : grads().buckets) Clear(*bucket);
    stage_ = Stage::kIdle;
    throw;
  }
  return stage_ == Stage::kDone;
}

void AwaitWorks(const UnitGrads& grads, GradBucket& bucket, const char* what) {
  Await(bucket.works, grads.collectives->rank(),
        [&] { return c10::str("the ", what, " of unit '", grads.unit, "'"); });
}

}  // namespace hsdp_ckpt::hsdp
