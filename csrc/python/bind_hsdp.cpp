// The wrapper's core: one call a unit and hook. The GIL is released wherever a collective may be waited for; the callbacks
// that Python hands in take it themselves.
#include <pybind11/functional.h>
#include <torch/csrc/utils/pybind.h>

#include "hsdp/param_group.h"
#include "hsdp/peers.h"
#include "hsdp/schedule.h"
#include "kernels/batched_copy.h"
#include "python/module.h"

namespace py = pybind11;

namespace hsdp_ckpt {

using NoGil = py::call_guard<py::gil_scoped_release>;

void BindHsdp(py::module_& module) {
  module.def("copied_bytes", &CopiedBytes);

  py::class_<Collectives, std::shared_ptr<Collectives>>(module, "Collectives")
      .def(py::init<std::string, std::optional<std::string>, int64_t>(), py::arg("shard_group"), py::arg("replica_group"),
           py::arg("rank"))
      .def("set_reduce_groups", &Collectives::SetReduceGroups, py::arg("shard_group"), py::arg("replica_group"))
      .def("set_channel", &Collectives::SetChannel, py::arg("channel"));

  py::class_<Peers, std::shared_ptr<Peers>>(module, "Peers")
      .def(py::init<std::string, std::vector<int64_t>>(), py::arg("group"), py::arg("ranks"))
      .def("exchange", &Peers::Exchange, py::arg("words"), NoGil());

  py::class_<Unit, std::shared_ptr<Unit>>(module, "Unit")
      .def(py::init([](std::vector<std::vector<int64_t>> sizes, std::vector<at::ScalarType> dtypes, at::Device device,
                       std::shared_ptr<Collectives> collectives, std::optional<bool> reshard_after_forward,
                       std::function<void()> on_backward, std::function<void()> on_reduced,
                       std::optional<at::ScalarType> param_dtype, std::optional<at::ScalarType> reduce_dtype,
                       bool keep_low_precision_grads) {
             auto unit = std::make_shared<Unit>();
             unit->group = std::make_shared<ParamGroup>(std::move(sizes), std::move(dtypes),
                                                        Precision{param_dtype, reduce_dtype, keep_low_precision_grads},
                                                        device, std::move(collectives));
             unit->reshard_after_forward = reshard_after_forward;
             unit->on_backward = std::move(on_backward);
             unit->on_reduced = std::move(on_reduced);
             return unit;
           }),
           py::arg("sizes"), py::arg("dtypes"), py::arg("device"), py::arg("collectives"), py::arg("reshard_after_forward"),
           py::arg("on_backward"), py::arg("on_reduced"), py::arg("param_dtype") = py::none(),
           py::arg("reduce_dtype") = py::none(), py::arg("keep_low_precision_grads") = false)
      .def(
          "set_all_reduce", [](Unit& unit, bool all_reduce) { unit.group->reduce_options().all_reduce = all_reduce; },
          py::arg("all_reduce"))
      .def(
          "set_divide_factor",
          [](Unit& unit, std::optional<double> factor) { unit.group->reduce_options().divide_factor = factor; },
          py::arg("factor"))
      .def(
          "set_all_reduce_hook",
          [](Unit& unit, std::function<void(const at::Tensor&)> hook) {
            unit.group->reduce_options().all_reduce_hook = std::move(hook);
          },
          py::arg("hook"))
      .def_property(
          "name", [](const Unit& unit) { return unit.group->name(); },
          [](Unit& unit, std::string name) { unit.group->set_name(std::move(name)); })
      .def_readwrite("sync", &Unit::sync)
      .def_readwrite("reshard_after_forward", &Unit::reshard_after_forward)
      .def_readwrite("reshard_after_backward", &Unit::reshard_after_backward)
      .def_readonly("frozen", &Unit::frozen)
      .def(
          "set_prefetch",
          [](Unit& unit, const std::vector<std::shared_ptr<Unit>>& units, bool forward) {
            (forward ? unit.forward_prefetch : unit.backward_prefetch).assign(units.begin(), units.end());
          },
          py::arg("units"), py::arg("forward"))
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
      .def(
          "drop_kept", [](Unit& unit) { unit.group->DropKept(); }, NoGil())
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
      .def(py::init([](int backward_prefetch, int64_t rank, std::shared_ptr<Peers> peers,
                       std::function<void()> on_backward_end) {
             return std::make_shared<Schedule>(static_cast<Schedule::BackwardPrefetch>(backward_prefetch), rank,
                                               std::move(peers), std::move(on_backward_end));
           }),
           py::arg("backward_prefetch"), py::arg("rank"), py::arg("peers"), py::arg("on_backward_end"))
      .def("add", &Schedule::Add, py::arg("unit"), py::arg("full"), py::arg("trainable"), NoGil())
      .def("enter_forward", &Schedule::EnterForward, py::arg("unit"), py::arg("grad_enabled"), py::arg("inputs"), NoGil())
      .def("leave_forward", &Schedule::LeaveForward, py::arg("unit"), py::arg("outputs"), NoGil())
      .def("abort_forward", &Schedule::AbortForward, py::arg("unit"), NoGil())
      .def("hold", &Schedule::Hold, py::arg("unit"), py::arg("wait"), NoGil())
      .def("release", &Schedule::Release, py::arg("unit"), NoGil())
      .def("set_last_backward", &Schedule::SetLastBackward, py::arg("last"))
      .def("finish_reductions", &Schedule::FinishReductions, NoGil())
      .def(
          "take_turn", [](Schedule& schedule) { return schedule.turn().BeginRead().value(); }, NoGil())
      .def("begin_read", &Schedule::BeginRead, py::arg("only_if_quiet") = false, NoGil())
      .def("end_read", [](Schedule& schedule) { schedule.turn().EndRead(); })
      .def("running_here", [](Schedule& schedule) { return schedule.turn().running_here(); })
      .def("reset", &Schedule::Reset, NoGil());
}

}  // namespace hsdp_ckpt
