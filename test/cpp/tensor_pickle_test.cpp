#include "format/tensor_pickle.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"

namespace hsdp_ckpt {
namespace {

TEST(TensorPickleTest, FewBytesMakeNoDeepOrLargeValue) {
  const auto decode = [](const std::string& opcodes) {
    return format::DecodeTensorPickle(base::AsBytes("\x80\x02" + opcodes + "."));
  };
  const std::string valid(base::AsText(format::EncodeTensorPickle(
      format::ContiguousTensor(*format::FindRecordDtype("float32"), std::vector<int64_t>{2, 3}))));
  ASSERT_TRUE(decode(valid.substr(2, valid.size() - 3)));
  std::string deep = ")", doubled = ")q" + std::string(1, '\0'),
              repeated = "X" + std::string("\0\x40\0\0", 4);
  deep.append(60000, '\x85');
  for (int i = 0; i < 60; ++i) doubled += std::string("h\0h\0\x86q\0", 7);
  repeated += std::string(0x4000, 'x') + std::string("q\0", 2);
  for (int i = 0; i < 20000; ++i) repeated += std::string("h\0", 2);
  for (const auto& opcodes : {deep, doubled, repeated}) EXPECT_FALSE(decode(opcodes));
}

TEST(TensorPickleTest, StridesOfAnEmptyTensorHaveToFit) {
  const std::vector<int64_t> shape{0, int64_t{1} << 62, 4};
  EXPECT_THROW(format::ContiguousTensor(*format::FindRecordDtype("uint8"), shape), base::Error);
  EXPECT_EQ(format::ContiguousTensor(*format::FindRecordDtype("uint8"), std::vector<int64_t>{0, 7})
                .stride,
            (std::vector<int64_t>{7, 1}));
}

}  // namespace
}  // namespace hsdp_ckpt
