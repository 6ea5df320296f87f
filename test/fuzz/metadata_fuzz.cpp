// Any bytes at all as a `.metadata`: the decoder answers with a value or with one of our
// exceptions. What it accepts it must write and read back to the same value.
#include <cstdint>
#include <cstdlib>

#include "base/error.h"
#include "format/metadata.h"
#include "format/trailer.h"
#include "pickle/pickle_strings.h"

namespace hsdp_ckpt {
namespace {

// NaNs differ from themselves, so values with them are compared as bytes.
bool Same(const format::Metadata& a, const format::Metadata& b) {
  return a == b || format::EncodeMetadata(a) == format::EncodeMetadata(b);
}

void TestOneInput(std::span<const std::byte> input) {
  format::Metadata metadata;
  try {
    metadata = format::DecodeMetadata(input, "fuzz");
  } catch (const base::Error&) {
    return;
  }
  size_t strings = 0;  // the two readers agree about where the opcodes are
  pickle::ForEachString(format::CheckMetadataTrailer(input, "fuzz").pickle, "fuzz",
                        [&](std::string_view) { ++strings; });
  if (strings == 0) std::abort();
  const std::string file = format::EncodeMetadata(metadata);
  const std::span<const std::byte> bytes = std::as_bytes(std::span(file));
  if (!format::CheckMetadataTrailer(bytes, "fuzz").checked) std::abort();
  // Planner nodes may come in another order, so a second round is compared with the first.
  const format::Metadata once = format::DecodeMetadata(bytes, "fuzz");
  const std::string again = format::EncodeMetadata(once);
  const format::Metadata twice = format::DecodeMetadata(std::as_bytes(std::span(again)), "fuzz");
  if (!Same(once, twice)) std::abort();
  if (once.state_dict_metadata != metadata.state_dict_metadata ||
      once.storage_data != metadata.storage_data || once.storage_meta != metadata.storage_meta ||
      once.version != metadata.version) {
    std::abort();
  }
}

}  // namespace
}  // namespace hsdp_ckpt

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  hsdp_ckpt::TestOneInput(std::as_bytes(std::span(data, size)));
  return 0;
}
