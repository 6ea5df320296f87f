#include "hsdp/background.h"

#include <c10/core/thread_pool.h>
#include <c10/util/thread_name.h>

#include <utility>

#include "kernels/pieces_cpu.h"

namespace hsdp_ckpt::hsdp {
namespace {

c10::ThreadPool& Thread(Background where) {
  static auto& shards = *new c10::ThreadPool(1, -1, [] { c10::setThreadName("hsdp_shards"); });
  static auto& replicas = *new c10::ThreadPool(1, -1, [] { c10::setThreadName("hsdp_replicas"); });
  return where == Background::kShards ? shards : replicas;
}

}  // namespace

void RunInBackground(Background where, std::function<void()> task) {
  Thread(where).run([task = std::move(task)] {
    const kernels::OneThread one_thread;
    task();
  });
}

}  // namespace hsdp_ckpt::hsdp
