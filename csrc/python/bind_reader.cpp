// Reading records, for torch_hsdp_ckpt/checkpoint/storage/tensor_reads.py: one call takes all reads
// of a load. Targets cross as addresses: the caller keeps them alive and contiguous until the plan
// has been read. The GIL is released for all that reads or waits.
#include <algorithm>
#include <cstring>

#include "checkpoint/load/checkpoint_reader.h"
#include "format/metadata.h"
#include "format/record_dtype.h"
#include "io/file.h"
#include "python/module.h"

namespace py = pybind11;

namespace hsdp_ckpt::python {
namespace {

/// A box that the caller takes from the record's bytes itself.
struct StagedBox {
  size_t index;  ///< number of the box in the call
  std::string dtype;
  format::Shape stride;
  int64_t storage_offset;
};

/// The answer to one call of CheckpointReader.resolve: each box is in one of the three.
struct ResolvedReads {
  py::object plan;  ///< a ReadPlan of the boxes that go straight into their targets
  std::vector<StagedBox> staged;
  std::vector<size_t> torch_only;  ///< numbers of boxes whose records only torch can read
};

std::byte* Pointer(uintptr_t address) { return reinterpret_cast<std::byte*>(address); }

ResolvedReads Resolve(const py::object& self, const std::vector<checkpoint::BoxRead>& boxes,
                      int threads) {
  auto& reader = self.cast<checkpoint::CheckpointReader&>();
  ResolvedReads resolved;
  std::unique_ptr<checkpoint::ReadPlan> plan;
  {
    const py::gil_scoped_release release;
    std::vector<checkpoint::PlannedRead> in_place;
    std::vector<checkpoint::BoxStrategy> strategies = reader.Resolve(boxes, threads);
    using Kind = checkpoint::BoxStrategy::Kind;
    for (size_t i = 0; i < strategies.size(); ++i) {
      checkpoint::BoxStrategy& strategy = strategies[i];
      format::TensorDescription& tensor = strategy.tensor;
      if (strategy.kind == Kind::kInPlace) in_place.push_back(std::move(strategy.read));
      if (strategy.kind == Kind::kTorch) resolved.torch_only.push_back(i);
      if (strategy.kind == Kind::kStaged)
        resolved.staged.push_back(
            {i, std::string(tensor.dtype->name), std::move(tensor.stride), tensor.storage_offset});
    }
    plan = std::make_unique<checkpoint::ReadPlan>(reader.files(), std::move(in_place));
  }
  resolved.plan = py::cast(std::move(plan));
  py::detail::keep_alive_impl(resolved.plan, self);
  return resolved;
}

py::list ReadObjects(const checkpoint::CheckpointReader& reader,
                     const std::vector<checkpoint::RecordPlace>& objects, int threads) {
  std::vector<std::vector<std::byte>> bytes;
  {
    const py::gil_scoped_release release;
    bytes = reader.ReadObjects(objects, threads);
  }
  py::list out;
  for (auto& object : bytes) {
    out.append(py::bytes(reinterpret_cast<const char*>(object.data()), object.size()));
    object = {};
  }
  return out;
}

void BindReads(py::module_& module) {
  using checkpoint::BoxRead;
  using checkpoint::RangeRead;
  using checkpoint::RecordPlace;
  py::class_<RecordPlace>(module, "RecordPlace")
      .def(py::init([](std::string fqn, std::string file, int64_t offset, int64_t length,
                       const format::Shape& chunk) {
             const uint32_t owner = format::RecordOwner(fqn, chunk);
             return RecordPlace{std::move(fqn), std::move(file), offset, length, owner};
           }),
           py::arg("fqn"), py::arg("file"), py::arg("offset"), py::arg("length"), py::arg("chunk"))
      .def_readonly("fqn", &RecordPlace::name)
      .def_readonly("file", &RecordPlace::file)
      .def_readonly("offset", &RecordPlace::offset)
      .def_readonly("length", &RecordPlace::length);
  py::class_<BoxRead>(module, "BoxRead")
      .def(py::init([](const RecordPlace& record, format::Shape offsets, format::Shape lengths,
                       const std::optional<std::string>& dtype, uintptr_t address) {
             const format::RecordDtype* known = dtype ? format::FindRecordDtype(*dtype) : nullptr;
             return BoxRead{record, std::move(offsets), std::move(lengths), known,
                            Pointer(address)};
           }),
           py::arg("record"), py::arg("offsets"), py::arg("lengths"), py::arg("dtype"),
           py::arg("address"));
  py::class_<RangeRead>(module, "RangeRead")
      .def(py::init([](const RecordPlace& record, int64_t first, int64_t size, uintptr_t address) {
             return RangeRead{record, first, size, Pointer(address)};
           }),
           py::arg("record"), py::arg("first"), py::arg("size"), py::arg("address"));
  py::class_<StagedBox>(module, "StagedBox")
      .def_readonly("index", &StagedBox::index)
      .def_readonly("dtype", &StagedBox::dtype)
      .def_readonly("stride", &StagedBox::stride)
      .def_readonly("storage_offset", &StagedBox::storage_offset);
  py::class_<ResolvedReads>(module, "ResolvedReads")
      .def_readonly("plan", &ResolvedReads::plan)
      .def_readonly("staged", &ResolvedReads::staged)
      .def_readonly("torch_only", &ResolvedReads::torch_only);
}

void BindReadPlan(py::module_& module) {
  using checkpoint::ReadPlan;
  const auto released = py::call_guard<py::gil_scoped_release>();
  py::class_<ReadPlan>(module, "ReadPlan")
      .def_property_readonly("extents", [](const ReadPlan& plan) { return plan.extents().size(); })
      .def_property_readonly("bytes", &ReadPlan::bytes)
      .def_property_readonly("digest",
                             [](const ReadPlan& plan) { return py::bytes(plan.Digest()); })
      .def_property_readonly("bytes_read", &ReadPlan::bytes_read)
      .def_property_readonly_static("BUFFER_BYTES",
                                    [](const py::object&) { return ReadPlan::kBufferBytes; })
      .def("read_all", &ReadPlan::ReadAll, py::arg("threads"), released)
      .def(
          "fill",
          [](ReadPlan& plan, size_t extent, uintptr_t buffer) {
            plan.Fill(extent, Pointer(buffer));
          },
          py::arg("extent"), py::arg("buffer"), released)
      .def(
          "deliver",
          [](ReadPlan& plan, size_t extent, uintptr_t buffer) {
            plan.Deliver(extent, Pointer(buffer));
          },
          py::arg("extent"), py::arg("buffer"), released)
      .def("finish", &ReadPlan::Finish, released);
}

}  // namespace

void BindReader(py::module_& module) {
  module.def(
      "is_in_memory",
      [](const std::string& path) { return io::PosixFileSystem().IsInMemory(path); },
      py::arg("path"));
  BindReads(module);
  BindReadPlan(module);
  using checkpoint::CheckpointReader;
  const auto released = py::call_guard<py::gil_scoped_release>();
  py::class_<CheckpointReader>(module, "CheckpointReader")
      .def(py::init([](const std::string& directory, bool direct) {
             return std::make_unique<CheckpointReader>(io::PosixFileSystem(), directory, direct);
           }),
           py::arg("directory"), py::arg("direct"))
      .def(
          "open",
          [](CheckpointReader& reader, const std::vector<std::string>& names, int threads) {
            reader.Open(names, threads);
          },
          py::arg("names"), py::arg("threads"), released)
      .def("resolve", &Resolve, py::arg("boxes"), py::arg("threads"))
      .def(
          "plan",
          [](const CheckpointReader& reader, const std::vector<checkpoint::RangeRead>& ranges) {
            return reader.Plan(ranges);
          },
          py::arg("ranges"), py::keep_alive<0, 1>(), released)
      .def("read_objects", &ReadObjects, py::arg("objects"), py::arg("threads"));
}

}  // namespace hsdp_ckpt::python
