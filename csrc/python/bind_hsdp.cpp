// The wrapper's core: one call a unit and hook. The GIL is released wherever a collective may be waited for; the callbacks
// that Python hands in take it themselves.
#include <pybind11/functional.h>
#include <torch/csrc/utils/pybind.h>

#include "hsdp/param_group.h"
#include "hsdp/schedule.h"
#include "python/module.h"

namespace py = pybind11;

namespace hsdp_ckpt {

using NoGil = py::call_guard<py::gil_scoped_release>;

void BindHsdp(py::module_& module) {
  py::class_<Collectives, std::shared_ptr<Collectives>>(module, "Collectives")
      .def(py::init<std::string, std::optional<std::string>>(), py::arg("shard_group"), py::arg("replica_group"))
      .def("set_reduce_groups", &Collectives::SetReduceGroups, py::arg("shard_group"), py::arg("replica_group"));

  py::class_<Unit, std::shared_ptr<Unit>>(module, "Unit")
      .def(py::init([](std::vector<std::vector<int64_t>> sizes, std::vector<at::ScalarType> dtypes, at::Device device,
                       std::shared_ptr<Collectives> collectives, bool reshard_after_forward,
                       std::function<void()> on_backward, std::function<void()> on_reduced) {
             auto unit = std::make_shared<Unit>();
             unit->group =
                 std::make_shared<ParamGroup>(std::move(sizes), std::move(dtypes), device, std::move(collectives));
             unit->reshard_after_forward = reshard_after_forward;
             unit->on_backward = std::move(on_backward);
             unit->on_reduced = std::move(on_reduced);
             return unit;
           }),
           py::arg("sizes"), py::arg("dtypes"), py::arg("device"), py::arg("collectives"), py::arg("reshard_after_forward"),
           py::arg("on_backward"), py::arg("on_reduced"))
      .def(
          "shard", [](Unit& unit, const std::vector<at::Tensor>& full) { return unit.group->ShardFull(full); },
          py::arg("full"), NoGil())
      .def(
          "rebind",
          [](Unit& unit, const std::vector<at::Tensor>& shards, at::Device device) {
            return unit.group->Rebind(shards, device);
          },
          py::arg("shards"), py::arg("device"), NoGil())
      .def("empty_full", [](const Unit& unit) { return unit.group->EmptyFull(); })
      .def("join_grads", [](Unit& unit) { unit.group->reducer().Join(); })
      .def("empty_grads", [](const Unit& unit) { return unit.group->reducer().EmptyShards(); })
      .def(
          "unused", [](const Unit& unit) { return unit.group->reducer().Unused(); }, NoGil())
      .def(
          "write_grads",
          [](Unit& unit, const std::vector<std::optional<at::Tensor>>& targets, const std::vector<bool>& accumulate) {
            unit.group->reducer().Write(targets, accumulate);
          },
          py::arg("targets"), py::arg("accumulate"), NoGil());

  py::class_<Schedule, std::shared_ptr<Schedule>>(module, "Schedule")
      .def(py::init([](int backward_prefetch, std::function<void()> on_backward_end) {
             return std::make_shared<Schedule>(static_cast<Schedule::BackwardPrefetch>(backward_prefetch),
                                               std::move(on_backward_end));
           }),
           py::arg("backward_prefetch"), py::arg("on_backward_end"))
      .def("add", &Schedule::Add, py::arg("unit"), py::arg("full"), py::arg("trainable"), NoGil())
      .def("enter_forward", &Schedule::EnterForward, py::arg("unit"), py::arg("grad_enabled"), NoGil())
      .def("leave_forward", &Schedule::LeaveForward, py::arg("unit"), py::arg("outputs"), NoGil())
      .def("abort_forward", &Schedule::AbortForward, py::arg("unit"), NoGil())
      .def("set_sync", &Schedule::set_sync, py::arg("sync"))
      .def("reset", &Schedule::Reset, NoGil());
}

}  // namespace hsdp_ckpt
