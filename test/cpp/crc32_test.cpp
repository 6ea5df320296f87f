#include "base/crc32.h"

#include <gtest/gtest.h>

#include <string_view>

namespace hsdp_ckpt {
namespace {

std::span<const std::byte> Bytes(std::string_view text) { return std::as_bytes(std::span(text)); }

TEST(Crc32Test, IsTheCrcOfZipAndGzip) {
  EXPECT_EQ(base::Crc32(Bytes("123456789")),
            0xCBF43926u);  // the check value of the CRC catalogue, CRC-32/ISO-HDLC
  EXPECT_EQ(base::Crc32({}), 0u);
}

TEST(Crc32Test, ContinuesFromASeed) {
  EXPECT_EQ(base::Crc32(Bytes("6789"), base::Crc32(Bytes("12345"))), 0xCBF43926u);
}

// A tensor without elements has no memory: null pointers, which no function of the C library takes.
TEST(Crc32Test, NoBytesNeedNoMemory) {
  EXPECT_EQ(base::Crc32({}, 7), 7u);
  EXPECT_EQ(base::CopyAndCrc32({}, {}, 7), 7u);
}

}  // namespace
}  // namespace hsdp_ckpt
