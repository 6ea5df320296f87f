// The load engine for torch_hsdp_ckpt/checkpoint/storage/tensor_reads.py: one call takes all items
// of a load. Targets cross as addresses: the caller keeps them alive and contiguous until the plan
// has been read. The GIL is released for all that reads or waits.
#include <algorithm>
#include <cstring>

#include "base/bytes.h"
#include "base/parallel.h"
#include "checkpoint/load/checkpoint_reader.h"
#include "format/saved_object.h"
#include "io/file.h"
#include "python/module.h"

namespace py = pybind11;

namespace hsdp_ckpt::python {
namespace {

using Shape = std::vector<int64_t>;
using ItemArgument = std::tuple<std::string, uint32_t, int64_t, int64_t, Shape, Shape,
                                std::optional<std::string>, uintptr_t>;
using ReadArgument =
    std::tuple<std::string, uint32_t, int64_t, int64_t, int64_t, int64_t, uintptr_t>;
using ObjectArgument = std::tuple<std::string, uint32_t, int64_t, int64_t>;
using Names = std::vector<std::string>;

checkpoint::ItemRequest Request(const ItemArgument& argument) {
  const auto& [name, file, offset, length, box_offsets, box_lengths, dtype, address] = argument;
  const format::DType* target = dtype ? format::FindDType(std::string_view(*dtype)) : nullptr;
  return {name,        file,        offset, length,
          box_offsets, box_lengths, target, reinterpret_cast<std::byte*>(address)};
}

py::object Answer(const checkpoint::ItemAnswer& answer) {
  if (answer.kind == checkpoint::ItemAnswer::Kind::kTorch) return py::none();
  if (answer.kind == checkpoint::ItemAnswer::Kind::kLands) return py::bool_(true);
  const format::TensorDescription& tensor = answer.tensor;
  return py::make_tuple(std::string(tensor.dtype->name), tensor.shape, tensor.stride,
                        tensor.storage_offset);
}

py::tuple Resolve(const py::object& self, const std::vector<ItemArgument>& items, int threads) {
  auto& reader = self.cast<checkpoint::CheckpointReader&>();
  std::vector<checkpoint::ItemRequest> requests;
  requests.reserve(items.size());
  for (const auto& item : items) requests.push_back(Request(item));
  std::vector<checkpoint::ItemAnswer> answers;
  std::unique_ptr<checkpoint::ReadPlan> plan;
  {
    const py::gil_scoped_release release;
    answers = reader.Resolve(requests, threads);
    std::vector<checkpoint::PlannedRead> reads;
    for (checkpoint::ItemAnswer& answer : answers) {
      if (answer.kind == checkpoint::ItemAnswer::Kind::kLands)
        reads.push_back(std::move(answer.read));
    }
    plan = std::make_unique<checkpoint::ReadPlan>(reader.files(), std::move(reads));
  }
  py::list out;
  for (const checkpoint::ItemAnswer& answer : answers) out.append(Answer(answer));
  const py::object owned = py::cast(std::move(plan));
  py::detail::keep_alive_impl(owned, self);
  return py::make_tuple(owned, out);
}

std::unique_ptr<checkpoint::ReadPlan> MakePlan(checkpoint::CheckpointReader& reader,
                                               const std::vector<ReadArgument>& arguments) {
  std::vector<checkpoint::PlannedRead> reads;
  for (const auto& [name, file, offset, length, first, size, address] : arguments) {
    reads.push_back(
        {file, {name, offset, length, first, size, reinterpret_cast<std::byte*>(address)}});
  }
  const py::gil_scoped_release release;
  return std::make_unique<checkpoint::ReadPlan>(reader.files(), std::move(reads));
}

py::list ReadObjects(checkpoint::CheckpointReader& reader,
                     const std::vector<ObjectArgument>& objects, int threads) {
  std::vector<std::vector<std::byte>> bytes(objects.size());
  {
    const py::gil_scoped_release release;
    base::ParallelFor(objects.size(), threads, [&](size_t i) {
      const auto& [name, file, offset, length] = objects[i];
      bytes[i] = reader.file(file).ReadBytes(name, offset, length);
    });
  }
  py::list out;
  for (auto& object : bytes) {
    out.append(py::bytes(reinterpret_cast<const char*>(object.data()), object.size()));
    object = {};
  }
  return out;
}

void CheckObject(const py::bytes& data, const std::string& what, const pickle::TorchNames& names) {
  const auto bytes = base::AsBytes(std::string_view(data));
  const py::gil_scoped_release release;
  format::CheckSavedObject(bytes, what, names);
}

}  // namespace

void BindReader(py::module_& module) {
  py::class_<pickle::TorchNames>(module, "TorchNames")
      .def(py::init([](decltype(pickle::TorchNames::renamed_modules) renamed_modules,
                       decltype(pickle::TorchNames::renamed_globals) renamed_globals,
                       decltype(pickle::TorchNames::tensor_classes) tensor_classes,
                       decltype(pickle::TorchNames::storage_item_sizes) storage_item_sizes) {
             return pickle::TorchNames{std::move(renamed_modules), std::move(renamed_globals),
                                       std::move(tensor_classes), std::move(storage_item_sizes)};
           }),
           py::kw_only(), py::arg("renamed_modules"), py::arg("renamed_globals"),
           py::arg("tensor_classes"), py::arg("storage_item_sizes"));
  module.def("check_object", &CheckObject, py::arg("data"), py::arg("what"), py::arg("names"));
  module.def(
      "is_in_memory",
      [](const std::string& path) { return io::PosixFileSystem().IsInMemory(path); },
      py::arg("path"));
  const auto released = py::call_guard<py::gil_scoped_release>();
  py::class_<checkpoint::ReadPlan>(module, "ReadPlan")
      .def_property_readonly("pieces",
                             [](const checkpoint::ReadPlan& plan) { return plan.pieces().size(); })
      .def_property_readonly("bytes", &checkpoint::ReadPlan::bytes)
      .def_property_readonly(
          "digest", [](const checkpoint::ReadPlan& plan) { return py::bytes(plan.Digest()); })
      .def_property_readonly("bytes_read", &checkpoint::ReadPlan::bytes_read)
      .def_property_readonly_static(
          "BUFFER_BYTES", [](const py::object&) { return checkpoint::ReadPlan::kBufferBytes; })
      .def("read_all", &checkpoint::ReadPlan::ReadAll, py::arg("threads"), released)
      .def(
          "fill",
          [](checkpoint::ReadPlan& plan, size_t piece, uintptr_t buffer) {
            plan.Fill(piece, reinterpret_cast<std::byte*>(buffer));
          },
          py::arg("piece"), py::arg("buffer"), released)
      .def(
          "deliver",
          [](checkpoint::ReadPlan& plan, size_t piece, uintptr_t buffer) {
            plan.Deliver(piece, reinterpret_cast<const std::byte*>(buffer));
          },
          py::arg("piece"), py::arg("buffer"), released)
      .def("finish", &checkpoint::ReadPlan::Finish, released);
  py::class_<checkpoint::CheckpointReader>(module, "CheckpointReader")
      .def(py::init([](const std::string& directory, bool direct) {
             return std::make_unique<checkpoint::CheckpointReader>(io::PosixFileSystem(), directory,
                                                                   direct);
           }),
           py::arg("directory"), py::arg("direct"))
      .def(
          "open",
          [](checkpoint::CheckpointReader& reader, const Names& names, int threads) {
            return reader.Open(names, threads);
          },
          py::arg("names"), py::arg("threads"), released)
      .def("resolve", &Resolve, py::arg("items"), py::arg("threads"))
      .def("plan", &MakePlan, py::arg("reads"), py::keep_alive<0, 1>())
      .def("read_objects", &ReadObjects, py::arg("objects"), py::arg("threads"));
}

}  // namespace hsdp_ckpt::python
