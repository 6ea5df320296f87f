// DCP's `.metadata` as hostile input, and what this package writes itself. test_metadata.py
// compares with Python's pickle.
#include "format/metadata.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

#include "base/error.h"
#include "format/trailer.h"
#include "pickle/pickle_strings.h"

namespace hsdp_ckpt {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

std::span<const std::byte> Bytes(std::string_view text) { return std::as_bytes(std::span(text)); }
format::Metadata Decode(std::string_view file) {
  return format::DecodeMetadata(Bytes(file), "dir/.metadata");
}

std::string ReadFile(const std::string& name) {
  std::ifstream file(std::string(HSDP_CKPT_TEST_DATA) + "/metadata/" + name, std::ios::binary);
  EXPECT_TRUE(file) << name;
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string Short(std::string_view text) {
  return std::string("\x8c") + static_cast<char>(text.size()) + std::string(text);
}
std::string Global(std::string_view module, std::string_view name) {
  return Short(module) + Short(name) + "\x93";
}
std::string Class(std::string_view name) {
  return Global("torch.distributed.checkpoint.metadata", name);
}

// A pickled Metadata with no entries, whose `field` is what `opcodes` leave on the stack.
std::string With(std::string_view field, std::string_view opcodes) {
  std::string pickle = "\x80\x04" + Class("Metadata") + ")\x81}(";
  if (field != "state_dict_metadata") pickle += Short("state_dict_metadata") + "}";
  return pickle + Short(field) + std::string(opcodes) + "ub.";
}

format::Metadata Example() {
  format::Metadata metadata;
  format::TensorMetadata tensor{{format::Dtype::k_bfloat16,
                                 format::Layout::k_strided,
                                 true,
                                 format::MemoryFormat::kChannelsLast,
                                 false,
                                 {}},
                                {5, 1099511627776},
                                {{{0, 0}, {3, 1099511627776}}, {{3, 0}, {2, 1099511627776}}}};
  metadata.state_dict_metadata = {{"w", tensor}, {"object", format::BytesMetadata{}}};
  tensor.properties.strides = format::Shape{-1, 70000};
  metadata.state_dict_metadata.emplace_back(std::string(300, 'x'), tensor);
  metadata.storage_data.emplace();
  metadata.storage_data->emplace_back(format::MetadataIndex{"w", format::Shape{3, 0}, 1},
                                      format::StorageInfo{"__0_0.distcp", 256, 65536, {}});
  metadata.storage_data->emplace_back(
      format::MetadataIndex{"object", {}, {}},
      format::StorageInfo{"a/b", 1, 2, std::vector<std::string>{"zstd"}});
  metadata.storage_meta =
      format::StorageMeta{format::PathlibPath{"PosixPath", {"/", "a"}}, "save", {}, {"m"}};
  metadata.version = "1.0.0";
  using Kind = format::PlainData::Kind;
  metadata.planner_data.nodes = {std::string("w"),
                                 int64_t{-5},
                                 format::PlainData::Container{Kind::kTuple, {0, 1, 0}},
                                 format::PlainData::BigInt{std::string(300, '\x01')},
                                 2.5,
                                 format::PlainData::Bytes{"\xff"},
                                 true,
                                 format::PlainData::None{},
                                 format::PlainData::Container{Kind::kList, {2, 2, 3, 4, 5, 6, 7}},
                                 format::PlainData::Container{Kind::kFrozenSet, {1}},
                                 format::PlainData::Container{Kind::kSet, {0}},
                                 format::PlainData::Container{Kind::kTuple, {}},
                                 format::PlainData::Container{Kind::kDict, {0, 8, 9, 10, 11, 8}}};
  return metadata;
}

TEST(MetadataTest, DecodesWhatItEncodes) {
  const format::Metadata example = Example();
  const format::Metadata decoded = Decode(format::EncodeMetadata(example));
  EXPECT_EQ(decoded.state_dict_metadata, example.state_dict_metadata);
  EXPECT_EQ(decoded.storage_data, example.storage_data);
  EXPECT_EQ(decoded.storage_data->at(0).first.index, 1);
  EXPECT_EQ(decoded.storage_meta, example.storage_meta);
  EXPECT_EQ(decoded.version, example.version);
  // The order of planner nodes is free, so what a second round gives must be what the first gave.
  EXPECT_EQ(Decode(format::EncodeMetadata(decoded)), decoded);
  EXPECT_EQ(decoded.planner_data.nodes.size(),
            example.planner_data.nodes.size() + 1);  // -5 is written twice
}

TEST(MetadataTest, DecodesStockFiles) {
  for (const std::string name : {"stock_2.11.metadata", "stock_2.15.metadata"}) {
    const format::Metadata metadata = Decode(ReadFile(name));
    ASSERT_EQ(metadata.state_dict_metadata.size(), 7u) << name;
    EXPECT_EQ(metadata.state_dict_metadata[0].first, "model.weight");
    const auto& weight = std::get<format::TensorMetadata>(metadata.state_dict_metadata[0].second);
    EXPECT_EQ(weight.size, (format::Shape{4, 3}));
    EXPECT_EQ(weight.properties.dtype, format::Dtype::k_float32);
    EXPECT_EQ(weight.properties.strides.has_value(), name == "stock_2.15.metadata");
    ASSERT_TRUE(metadata.storage_data.has_value());
    EXPECT_EQ(metadata.storage_data->size(), 7u);
    EXPECT_EQ(Decode(format::EncodeMetadata(metadata)), metadata);
  }
}

// Whatever the bytes are, the answer is a value or one of our exceptions.
TEST(MetadataTest, SurvivesTruncationAndFlippedBitsOfUncheckedFiles) {
  const std::string file = ReadFile("stock_2.15.metadata");
  int refused = 0;
  for (size_t length = 0; length < file.size(); ++length) {
    EXPECT_THROW(Decode(file.substr(0, length)), base::CorruptionError) << length;
  }
  for (size_t at = 0; at < file.size(); ++at) {
    for (const char mask : {'\x01', '\x80', '\xff'}) {
      std::string damaged = file;
      damaged[at] = static_cast<char>(damaged[at] ^ mask);
      try {
        Decode(damaged);
      } catch (const base::Error&) {
        ++refused;
      }
    }
  }
  EXPECT_GT(
      refused,
      static_cast<int>(
          file.size()));  // most of them; a changed letter of a name goes unseen without a checksum
}

TEST(PickleStringsTest, ArePassedInTheFilesOrder) {
  const auto strings = [](std::string_view pickle) {
    std::vector<std::string> found;
    pickle::ForEachString(Bytes(pickle), "f",
                          [&](std::string_view text) { found.emplace_back(text); });
    return found;
  };
  // An opcode of every kind of argument, each with an S among its bytes that is no opcode's.
  const std::string others =
      "\x80\x04\x95SSSSSSSSKSMSSJSSSSGSSSSSSSSqSrSSSShSjSSSSC\x01S\x8a\x01S" +
      std::string("B\x01\0\0\0S\x8b\x01\0\0\0S\x8e\x01\0\0\0\0\0\0\0S", 22) +
      "cS\nS\nIS\nFS\nLS\npS\ngS\n()]}\x94N";
  const std::string texts =
      Short("a") + "VBB\n" + std::string("X\x03\0\0\0ccc\x8d\x02\0\0\0\0\0\0\0dd", 19);
  EXPECT_THAT(strings(others + texts + others + "." + Short("behind")),
              ElementsAre("a", "BB", "ccc", "dd"));
  for (const std::string name : {"stock_2.11.metadata", "stock_2.15.metadata"}) {
    const std::string file = ReadFile(name);
    const auto found = strings(file);
    const format::Metadata metadata = Decode(file);
    for (const auto& [index, info] : *metadata.storage_data)
      EXPECT_THAT(found, Contains(info.relative_path)) << name;
    for (size_t length = 0; length < file.size(); ++length) {
      EXPECT_THROW(strings(file.substr(0, length)), base::CorruptionError) << length;
    }
  }
  EXPECT_THAT([&] { strings("\x80\x04S."); },
              ThrowsMessage<base::CorruptionError>(HasSubstr("opcode 83")));
}

TEST(MetadataTrailerTest, SeesEveryChangedByte) {
  const std::string file = format::EncodeMetadata(Example());
  EXPECT_TRUE(format::CheckMetadataTrailer(Bytes(file), "f").checked);
  for (size_t at = 0; at < file.size(); ++at) {
    std::string damaged = file;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x10);
    EXPECT_THROW(Decode(damaged), base::CorruptionError) << at;
  }
}

TEST(MetadataTrailerTest, NewerVersionIsToldFromDamage) {
  std::string file = format::EncodeMetadata(Example());
  file[file.size() - 8] = 2;
  EXPECT_THROW(Decode(file), base::CorruptionError);
}

TEST(MetadataTrailerTest, ARunMarkIsReadFromTheEndAndEveryChangedByteIsSeen) {
  const std::string plain = format::EncodeMetadata(Example());
  const format::RunMark mark{0xfedcba9876543210, 77};
  const std::string marked = format::WithRunMark(Bytes(plain), mark, "f");
  EXPECT_EQ(format::CheckMetadataTrailer(Bytes(marked), "f").pickle.size(),
            format::CheckMetadataTrailer(Bytes(plain), "f").pickle.size());
  const auto end = [](const std::string& file) {
    return Bytes(file).last(format::kRunMarkSize + format::kMetadataTrailerSize);
  };
  EXPECT_EQ(format::ParseRunMark(end(marked)), mark);
  EXPECT_EQ(format::ParseRunMark(end(plain)), std::nullopt);
  const format::RunMark later{1, 78};
  EXPECT_EQ(format::ParseRunMark(end(format::WithRunMark(Bytes(marked), later, "f"))), later);
  for (size_t at = 0; at < marked.size(); ++at) {
    std::string damaged = marked;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x10);
    EXPECT_THROW(Decode(damaged), base::CorruptionError) << at;
    const auto found = format::ParseRunMark(end(damaged));
    EXPECT_TRUE(!found || *found == mark) << at;
  }
}

TEST(MetadataHostileTest, RunsNothingAndNamesTheClass) {
  std::system("rm -f hostile_mark");
  const std::string call = Short("touch hostile_mark") + "\x85R";
  for (const std::string& global :
       {Global("os", "system"), std::string("cposix\nsystem\n"), Global("posix", "system")}) {
    const bool os = global == Global("os", "system");
    EXPECT_THAT([&] { Decode(With("planner_data", global + call)); },
                ThrowsMessage<base::Error>(AllOf(HasSubstr(os ? "os.system" : "posix.system"),
                                                 HasSubstr("dir/.metadata"))));
  }
  EXPECT_FALSE(std::ifstream("hostile_mark").good());
  // A known class is no way to an unknown one.
  const std::string encoding = Class("_MEM_FORMAT_ENCODING");
  EXPECT_THROW(Decode(With("planner_data", Global("builtins", "getattr") + encoding +
                                               Short("__class__") + "\x86R")),
               base::CorruptionError);
  EXPECT_THROW(Decode(With("planner_data", Global("builtins", "getattr") + Class("Metadata") +
                                               Short("x") + "\x86R")),
               base::CorruptionError);
  EXPECT_THROW(Decode(With("planner_data", Class("Metadata.__init__"))), base::Error);
  EXPECT_THROW(Decode(With("planner_data", Global("builtins", "object") + ")\x81")),
               base::CorruptionError);
}

TEST(MetadataHostileTest, LengthsAreCheckedBeforeAnythingIsAllocated) {
  const std::string huge8("\xff\xff\xff\xff\xff\xff\xff\x7f", 8), huge4("\xff\xff\xff\x7f", 4);
  for (const std::string& op :
       {"\x8d" + huge8, "\x8e" + huge8, "\x95" + huge8, "X" + huge4, "B" + huge4, "\x8b" + huge4,
        "r" + huge4, "j" + huge4, std::string("p99999999999999999999\n"),
        std::string("p4000000000\n")}) {
    EXPECT_THROW(Decode(With("planner_data", "N" + op)), base::CorruptionError);
  }
}

TEST(MetadataHostileTest, StackAndMemoAreFenced) {
  for (const std::string op :
       {"0",     "1",     "2",      "a",    "b",     "e",    "s",    "t",    "u",
        "R",     "\x81",  "\x85",   "\x86", "\x87",  "\x90", "\x91", "\x93", "\x94",
        "h\x05", "(0000", "}(NNNu", "](N",  "N\x85", ")R",   "q\x01"}) {
    EXPECT_THROW(Decode("\x80\x04" + op + "."), base::CorruptionError) << op;
  }
  for (const std::string op : {"P", "Q", "i", "o", "S", "T", "U", "\x82", "\x92", "\x96", "\x97",
                               "\x98", "\xff", "\x01"}) {
    EXPECT_THAT([&] { Decode(op); }, ThrowsMessage<base::CorruptionError>(HasSubstr("opcode")))
        << op;
  }
}

TEST(MetadataHostileTest, DepthIsBounded) {
  const auto nested = [](int depth) {
    return std::string(static_cast<size_t>(depth), ']') + "N" +
           std::string(static_cast<size_t>(depth), 'a');
  };
  EXPECT_EQ(Decode(With("planner_data", nested(150))).planner_data.nodes.size(), 151u);
  EXPECT_THROW(Decode(With("planner_data", nested(300))), base::CorruptionError);
  EXPECT_THROW(Decode(With("planner_data", nested(1000000))), base::CorruptionError);
  EXPECT_THROW(Decode(With("planner_data", std::string("]\x94h\0a", 5))),
               base::CorruptionError);  // a list in itself
  // A list of tuples, each of the one before: none is deep where it is decoded, the last one is
  // where a dict hashes it.
  const auto chain = [](int depth) {
    std::string opcodes(")q\xff(", 4);
    for (int i = 0; i < depth; ++i) opcodes += "h\xff\x85q\xff";
    return With("planner_data", "(" + opcodes + "l}h\xffNst");
  };
  EXPECT_GT(Decode(chain(100)).planner_data.nodes.size(), 100u);
  EXPECT_THROW(Decode(chain(1000000)), base::CorruptionError);
}

// `levels` lists, each of ten times the one before, all through the memo.
std::string Laughs(int levels, std::string_view open, std::string_view close) {
  std::string opcodes = "(N" + std::string("l") + "\x94";
  for (int level = 0; level < levels; ++level) {
    opcodes += open;
    for (int i = 0; i < 10; ++i) opcodes += std::string("h") + static_cast<char>(level);
    opcodes += std::string(close) + "\x94";
  }
  return opcodes + std::string("h") + static_cast<char>(levels);
}

TEST(MetadataHostileTest, SharedValuesDoNotUnfold) {
  // Kept as the graph it is: a node a level.
  const std::string stack = Laughs(40, "(", "l");
  std::string pickle = "\x80\x04" + stack + "\x94" + "1.";
  EXPECT_THROW(Decode(pickle), base::CorruptionError);
  const std::string value = "(" + Laughs(40, "(", "l") + "l";
  EXPECT_LT(Decode(With("planner_data", value)).planner_data.nodes.size(), 100u);
  // As a key, Python would hash the unfolded tuple.
  std::string tuples = "N\x85\x94";
  for (int level = 0; level < 60; ++level) {
    tuples +=
        std::string("h") + static_cast<char>(level) + "h" + static_cast<char>(level) + "\x86\x94";
  }
  EXPECT_THAT([&] { Decode(With("planner_data", "}(" + tuples + "0" + "h\x3cNu")); },
              ::testing::Throws<base::CorruptionError>());
}

TEST(MetadataHostileTest, SharedShapesAreCopiedOnlyInProportionToTheFile) {
  // One torch.Size of 2,000 dimensions, named in thousands of chunks' two fields.
  std::string size = Global("torch", "Size") + "(";
  for (int i = 0; i < 2000; ++i) size += "K\x01";
  size += "t\x85R\x94";
  const std::string chunk = Class("ChunkStorageMetadata") + ")\x81}(" + Short("offsets") + "h\x01" +
                            Short("sizes") + std::string("h\0ub", 4);
  std::string zeros = Global("torch", "Size") + "(";
  for (int i = 0; i < 2000; ++i) zeros += std::string("K\0", 2);
  zeros += "t\x85R\x94";
  std::string chunks = "](";
  for (int i = 0; i < 2000; ++i) chunks += chunk;
  const std::string properties = Class("TensorProperties") + ")\x81(" + Global("torch", "float32") +
                                 Global("torch.serialization", "_get_layout") +
                                 Short("torch.strided") + "\x85R\x89" +
                                 Class("_MEM_FORMAT_ENCODING") + std::string("K\0\x85R\x89tb", 7);
  const std::string tensor = Class("TensorStorageMetadata") + ")\x81}(" + Short("size") + size +
                             Short("junk") + zeros + Short("properties") + properties +
                             Short("chunks") + chunks + "eub";
  const std::string entries = "}" + Short("w") + tensor + "s";
  EXPECT_THAT([&] { Decode(With("state_dict_metadata", entries)); },
              ThrowsMessage<base::CorruptionError>(HasSubstr("shared values")));
}

TEST(MetadataHostileTest, TextMustBeUtf8) {
  EXPECT_NO_THROW(Decode(
      With("version", Short("\xf0\x9f\x98\x80 \xed\xa0\x80"))));  // lone surrogates are Python's
  for (const std::string text :
       {"\xff", "\xc0\x80", "\xe0\x80\x80", "\xf4\x90\x80\x80", "\xc3", "\x80"}) {
    EXPECT_THROW(Decode(With("version", Short(text))), base::CorruptionError);
  }
}

TEST(MetadataHostileTest, NamesStayInTheDirectory) {
  for (const std::string_view good : {"a", "a/b", "...", "__0_0.distcp", "a..b"})
    EXPECT_TRUE(format::IsInsideDirectory(good)) << good;
  for (const std::string_view bad :
       {std::string_view(""), std::string_view("/"), std::string_view("/a"), std::string_view("a/"),
        std::string_view("a//b"), std::string_view("."), std::string_view("a/.."),
        std::string_view("../a"), std::string_view("a\0b", 3)}) {
    EXPECT_FALSE(format::IsInsideDirectory(bad)) << bad;
  }
}

TEST(MetadataTest, EncoderRefusesPlannerDataOutOfOrder) {
  format::Metadata metadata;
  metadata.planner_data.nodes = {format::PlainData::Container{format::PlainData::Kind::kList, {0}}};
  EXPECT_THROW(format::EncodeMetadata(metadata), base::Error);
  metadata.planner_data.nodes = {format::PlainData::None{}};
  for (format::PlainData::Id i = 0; i < 300; ++i)
    metadata.planner_data.nodes.push_back(
        format::PlainData::Container{format::PlainData::Kind::kList, {i}});
  EXPECT_THROW(format::EncodeMetadata(metadata), base::Error);
}

}  // namespace
}  // namespace hsdp_ckpt
