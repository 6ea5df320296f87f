#include "hsdp/lent_memory.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/headeronly/version.h>
#include <torch/library.h>

namespace hsdp_ckpt::hsdp {
namespace {

#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 15
// These have a function that makes a storage raise when it is used, but none that ends this. An
// explicit instantiation may name a private member: that is the one way to reach it.
template <bool c10::StorageImpl::* kMember>
struct RaisesOnUse {
  friend bool& RaisesOnUseOf(c10::StorageImpl& storage) { return storage.*kMember; }
};
bool& RaisesOnUseOf(c10::StorageImpl& storage);
template struct RaisesOnUse<&c10::StorageImpl::throw_on_immutable_data_ptr_>;

void AllowUse(c10::StorageImpl& storage) { RaisesOnUseOf(storage) = false; }
#else
void AllowUse(c10::StorageImpl& storage) { storage.clear_data_ptr_access_error_msg_(); }
#endif

// The context of memory that is a piece of a lender's. Its deleter is what tells such memory.
void DeleteLender(void* lender) { delete static_cast<at::Storage*>(lender); }

at::DataPtr PieceOfStorage(const at::Storage& lender, void* data) {
  return {data, new at::Storage(lender), &DeleteLender, lender.device()};
}

}  // namespace

void Lend(const at::Tensor& tensor, const at::Tensor& lender, void* data) {
  c10::StorageImpl& storage = *tensor.storage().unsafeGetStorageImpl();
  AllowUse(storage);
  storage.set_data_ptr_noswap(PieceOfStorage(lender.storage(), data));
}

void TakeBack(const at::Tensor& tensor, const std::string& message) {
  c10::StorageImpl& storage = *tensor.storage().unsafeGetStorageImpl();
  storage.set_data_ptr_noswap(at::DataPtr(nullptr, storage.device()));
  if (tensor.numel() == 0) return;
  storage.release_data_and_set_meta_custom_data_ptr_error_msg_(message);
}

at::Tensor PieceOf(const at::Tensor& lender, void* data, at::IntArrayRef sizes,
                   at::ScalarType dtype) {
  // The device is named, because torch would ask the address for it, and that of a piece without
  // elements at the lender's end has another one, or none.
  return at::for_blob(data, sizes)
      .context(new at::Storage(lender.storage()), &DeleteLender)
      .target_device(lender.device())
      .options(lender.options().dtype(dtype))
      .make_tensor();
}

const at::DataPtr& OwnedMemory(const at::Tensor& tensor) {
  const at::DataPtr& memory = tensor.storage().data_ptr();
  if (memory.get_deleter() != &DeleteLender) return memory;
  return static_cast<const at::Storage*>(memory.get_context())->data_ptr();
}

namespace {

// Allocators know the memory that they have given out, and take no notice of pieces of it.
void RecordStream(at::Tensor& tensor, c10::Stream stream) {
  const at::AutoDispatchBelowADInplaceOrView below;
  if (!tensor.has_storage()) return tensor.record_stream(stream);
  const at::DataPtr& owned = OwnedMemory(tensor);
  if (&owned == &tensor.storage().data_ptr()) return tensor.record_stream(stream);
  c10::impl::VirtualGuardImpl(stream.device_type()).recordDataPtrOnStream(owned, stream);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, AutogradCUDA, library) { library.impl("record_stream", &RecordStream); }
TORCH_LIBRARY_IMPL(aten, AutogradXPU, library) { library.impl("record_stream", &RecordStream); }
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, library) {
  library.impl("record_stream", &RecordStream);
}

}  // namespace hsdp_ckpt::hsdp
