#include "kernels/pieces_cpu.h"

#include <ATen/EmptyTensor.h>
#include <ATen/TensorIterator.h>

namespace hsdp_ckpt::kernels {

// at::parallel_for is a template that is parallel only in a file compiled with OpenMP, which would
// bring a second OpenMP beside the one in torch's wheel. TensorIterator's loop is compiled in
// torch: one element for each task, never touched.
void ForEachTask(int64_t tasks, c10::function_ref<void(int64_t, int64_t)> run) {
  const at::TensorBase tickets = at::detail::empty_cpu({tasks}, at::kByte);
  auto iterator = at::TensorIteratorConfig()
                      .add_output(tickets)
                      .check_all_same_dtype(false)
                      .resize_outputs(false)
                      .build();
  const auto* base = static_cast<const char*>(tickets.const_data_ptr());
  const auto loop = [&](char** data, const int64_t* strides, int64_t inner, int64_t outer) {
    for (int64_t i = 0; i < outer; ++i) {
      const int64_t first = data[0] + i * strides[1] - base;
      run(first, first + inner);
    }
  };
  iterator.for_each(at::TensorIterator::loop2d_t(loop), /*grain_size=*/1);
}

}  // namespace hsdp_ckpt::kernels
