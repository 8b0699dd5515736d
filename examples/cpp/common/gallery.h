// Search of a gallery by blocks: never all similarities at once.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <tuple>
#include <vector>

// The k most similar of the gallery [G, D] for each of the probes [P, D], rows of unit length: cosines and places,
// [P, k] each, best first; k at most G. No more than block x block similarities are held at a time.
inline std::tuple<torch::Tensor, torch::Tensor>
search_gallery(const torch::Tensor& probes, const torch::Tensor& gallery, int64_t k, int64_t block = 4096) {
  TORCH_CHECK(
      probes.dim() == 2 && gallery.dim() == 2 && probes.size(1) == gallery.size(1),
      "search_gallery: expected probes [P, D] and a gallery [G, D], but got ", probes.sizes(), " and ",
      gallery.sizes());
  TORCH_CHECK(
      k >= 1 && k <= gallery.size(0), "search_gallery: expected k in [1, ", gallery.size(0),
      "], the size of the gallery, but got ", k);
  TORCH_CHECK(block >= 1, "search_gallery: expected block to be positive, but got ", block);
  std::vector<torch::Tensor> cosines, places;
  for (const torch::Tensor& some : probes.split(block)) {
    torch::Tensor best, place;
    for (int64_t start = 0; start < gallery.size(0); start += block) {
      const torch::Tensor part = gallery.slice(0, start, std::min(start + block, gallery.size(0)));
      auto [found, at] = some.matmul(part.t()).topk(std::min(k, part.size(0)), 1);
      at = at + start;
      if (best.defined()) {
        found = torch::cat({best, found}, 1);
        at = torch::cat({place, at}, 1);
      }
      torch::Tensor order;
      std::tie(best, order) = found.topk(std::min(k, found.size(1)), 1);
      place = at.gather(1, order);
    }
    cosines.push_back(best);
    places.push_back(place);
  }
  return {torch::cat(cosines), torch::cat(places)};
}
