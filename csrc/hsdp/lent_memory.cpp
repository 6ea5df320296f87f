#include "hsdp/lent_memory.h"

#include <c10/core/StorageImpl.h>
#include <torch/headeronly/version.h>

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

// There is no deleter, as the memory is the lender's.
void Point(c10::StorageImpl& storage, void* data) {
  storage.set_data_ptr_noswap(at::DataPtr(data, storage.device()));
}

}  // namespace

void Lend(const at::Tensor& tensor, void* data) {
  c10::StorageImpl& storage = *tensor.storage().unsafeGetStorageImpl();
  AllowUse(storage);
  Point(storage, data);
}

void TakeBack(const at::Tensor& tensor, const std::string& message) {
  c10::StorageImpl& storage = *tensor.storage().unsafeGetStorageImpl();
  Point(storage, nullptr);
  if (tensor.numel() == 0) return;
  storage.release_data_and_set_meta_custom_data_ptr_error_msg_(message);
}

}  // namespace hsdp_ckpt::hsdp
