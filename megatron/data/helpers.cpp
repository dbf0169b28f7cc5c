// The two index builders that are inherently loops. index_helpers.py holds the same functions in numpy.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

using Int64Array = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;
using DoubleArray = py::array_t<double, py::array::c_style | py::array::forcecast>;

// sizes [documents], document_index [documents in the order they are read] -> int64 [num_samples + 1, 2].
// Row s is (position in document_index, offset in that document) of the first token of sample s, which is also
// the last token of sample s - 1.
py::array_t<std::int64_t> build_sample_index(const Int64Array& sizes, const Int64Array& document_index,
                                             std::int64_t seq_length, std::int64_t num_epochs,
                                             std::int64_t tokens_per_epoch) {
    if (seq_length < 1) throw std::invalid_argument("seq_length must be at least 1");
    const std::int64_t num_samples = std::max<std::int64_t>(0, num_epochs * tokens_per_epoch - 1) / seq_length;
    const auto size = sizes.unchecked<1>();
    const auto order = document_index.unchecked<1>();
    py::array_t<std::int64_t> result({num_samples + 1, static_cast<std::int64_t>(2)});
    auto row = result.mutable_unchecked<2>();
    row(0, 0) = 0;
    row(0, 1) = 0;

    std::int64_t position = 0;
    std::int64_t offset = 0;
    for (std::int64_t sample = 1; sample <= num_samples; ++sample) {
        offset += seq_length;
        while (true) {
            if (position >= order.shape(0)) throw std::invalid_argument("document_index ends before the last sample");
            const std::int64_t document = order(position);
            if (document < 0 || document >= size.shape(0)) throw std::invalid_argument("document_index is out of range");
            if (offset < size(document)) break;
            offset -= size(document);
            ++position;
        }
        row(sample, 0) = position;
        row(sample, 1) = offset;
    }
    return result;
}

// weights [datasets], summing to 1 -> (int16 [size], int64 [size]): which dataset, and which of its samples.
// Each step takes the dataset that lags its weight most; on a tie, the first of them.
py::tuple build_blending_indices(const DoubleArray& weights, std::int64_t size) {
    const auto weight = weights.unchecked<1>();
    const py::ssize_t num_datasets = weight.shape(0);
    if (num_datasets < 1 || num_datasets > INT16_MAX) throw std::invalid_argument("1 to 32767 weights are allowed");
    py::array_t<std::int16_t> dataset_index(size);
    py::array_t<std::int64_t> sample_index(size);
    auto dataset_of = dataset_index.mutable_unchecked<1>();
    auto sample_of = sample_index.mutable_unchecked<1>();
    std::vector<std::int64_t> taken(num_datasets, 0);
    for (std::int64_t step = 0; step < size; ++step) {
        const double drawn = static_cast<double>(step + 1);
        py::ssize_t chosen = 0;
        double largest_lag = weight(0) * drawn - static_cast<double>(taken[0]);
        for (py::ssize_t dataset = 1; dataset < num_datasets; ++dataset) {
            const double lag = weight(dataset) * drawn - static_cast<double>(taken[dataset]);
            if (lag > largest_lag) {
                largest_lag = lag;
                chosen = dataset;
            }
        }
        dataset_of(step) = static_cast<std::int16_t>(chosen);
        sample_of(step) = taken[chosen]++;
    }
    return py::make_tuple(dataset_index, sample_index);
}

PYBIND11_MODULE(_helpers, module) {
    module.doc() = "Index builders of megatron.data, compiled.";
    module.def("build_sample_index", &build_sample_index, py::arg("sizes"), py::arg("document_index"),
               py::arg("seq_length"), py::arg("num_epochs"), py::arg("tokens_per_epoch"));
    module.def("build_blending_indices", &build_blending_indices, py::arg("weights"), py::arg("size"));
}
