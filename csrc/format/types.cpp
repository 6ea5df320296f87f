#include "format/types.h"

#include <algorithm>
#include <array>

namespace hsdp_ckpt::format {
namespace {

#define HSDP_CKPT_NAME(name) std::string_view(#name),
constexpr std::array kDtypes{HSDP_CKPT_DTYPES(HSDP_CKPT_NAME)};
constexpr std::array kLayouts{HSDP_CKPT_LAYOUTS(HSDP_CKPT_NAME)};
#undef HSDP_CKPT_NAME
constexpr std::array kMemoryFormats{std::string_view("TORCH_CONTIGUOUS_FORMAT"),
                                    std::string_view("TORCH_CHANNELS_LAST"),
                                    std::string_view("TORCH_PRESERVE_FORMAT")};

// A few dozen names, looked up once a dtype and file: a linear search is enough.
template <typename Enum, size_t N>
std::optional<Enum> Find(const std::array<std::string_view, N>& names, std::string_view name) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) return std::nullopt;
  return static_cast<Enum>(found - names.begin());
}

}  // namespace

std::string_view Name(Dtype dtype) { return kDtypes.at(static_cast<size_t>(dtype)); }
std::string_view Name(Layout layout) { return kLayouts.at(static_cast<size_t>(layout)); }
std::string_view Name(MemoryFormat format) {
  return kMemoryFormats.at(static_cast<size_t>(format));
}
std::optional<Dtype> DtypeFromName(std::string_view name) { return Find<Dtype>(kDtypes, name); }
std::optional<Layout> LayoutFromName(std::string_view name) { return Find<Layout>(kLayouts, name); }
std::optional<MemoryFormat> MemoryFormatFromName(std::string_view name) {
  return Find<MemoryFormat>(kMemoryFormats, name);
}

}  // namespace hsdp_ckpt::format
