#include "base/error.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <vector>

namespace hsdp_ckpt {
namespace {

TEST(IoErrorTest, NamesCallFileOffsetAndCause) {
  const base::IoError error("pwrite", "/data/__0_0.distcp", 4096, ENOSPC);
  EXPECT_STREQ(error.what(), "pwrite /data/__0_0.distcp at offset 4096: No space left on device");
  EXPECT_EQ(error.error_number(), ENOSPC);
  EXPECT_STREQ(base::IoError("fsync", "/data", -1, EIO).what(), "fsync /data: Input/output error");
}

TEST(CorruptionErrorTest, NamesFileRecordAndBothValues) {
  const base::CorruptionError error("/data/a", "model.weight", "CRC 1", "CRC 2");
  EXPECT_STREQ(error.what(), "/data/a: model.weight: expected CRC 1, got CRC 2");
}

TEST(ErrorTextTest, ChecksumsAndShapesReadTheSameEverywhere) {
  EXPECT_EQ(base::CrcText(0xBADCAFE), "CRC 0badcafe");
  const std::vector<int64_t> none, some{3, -1, 40};
  EXPECT_EQ(base::ShapeText(none), "[]");
  EXPECT_EQ(base::ShapeText(some), "[3, -1, 40]");
}

}  // namespace
}  // namespace hsdp_ckpt
