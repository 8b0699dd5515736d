// torchmargin._C: what an operator cannot say. It includes no torch header, so it is
// tied to a Python version only; the ops live in libtorchmargin.so.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/introspection.h"

namespace {

pybind11::dict as_dict(const torchmargin::bindings::Plan& plan) {
  pybind11::dict result;
  result["path"] = plan.path;
  result["lanes"] = plan.lanes;
  result["row_tile"] = plan.row_tile;
  result["class_chunk"] = plan.class_chunk;
  result["input_splits"] = plan.input_splits;
  result["operand_dtype"] = plan.operand_dtype;
  result["kept_classes"] = plan.kept_classes;
  result["scratch_bytes"] = plan.scratch_bytes;
  result["workspace_limit"] = plan.workspace_limit;
  result["fits"] = plan.fits;
  return result;
}

} // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Versions, the workspace limit and the plan of the fused ops, and the published losses' numbers.";
  using namespace torchmargin::bindings;
  module.def("version", &version);
  module.def("built_for_torch", &built_for_torch);
  module.def("cuda_architectures", [] { return pybind11::tuple(pybind11::cast(cuda_architectures())); });
  module.def("get_workspace_limit", &get_workspace_limit, pybind11::arg("device_type"));
  module.def("set_workspace_limit", &set_workspace_limit, pybind11::arg("device_type"), pybind11::arg("bytes"));
  module.def(
      "plan",
      [](int64_t rows, int64_t features, int64_t classes, const std::string& dtype, const std::string& device_type,
         const std::string& compute_dtype) {
        return as_dict(choose_plan(rows, features, classes, dtype, device_type, compute_dtype));
      },
      pybind11::arg("rows"), pybind11::arg("features"), pybind11::arg("classes"), pybind11::arg("dtype"),
      pybind11::arg("device_type"), pybind11::arg("compute_dtype"));
  module.def(
      "plan_for_gpu",
      [](int64_t rows, int64_t features, int64_t classes, int64_t processors, int64_t l2_bytes, bool fused_tiles) {
        return as_dict(choose_plan_for_gpu(rows, features, classes, processors, l2_bytes, fused_tiles));
      },
      pybind11::arg("rows"), pybind11::arg("features"), pybind11::arg("classes"), pybind11::arg("processors"),
      pybind11::arg("l2_bytes"), pybind11::arg("fused_tiles"));
  module.def("published_losses", &published_losses);
}
