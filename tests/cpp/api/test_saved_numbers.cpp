// The options' numbers are saved with the weight: buffers, archives, state dicts, clones, casts.
#include <algorithm>
#include <filesystem>
#include <set>

#include "api/losses.h"

namespace {

const double kNaN = std::numeric_limits<double>::quiet_NaN();

struct TemporaryFile {
  explicit TemporaryFile(const std::string& name)
      : path((std::filesystem::temp_directory_path() / ("torchmargin_" + name + ".pt")).string()) {}
  ~TemporaryFile() {
    std::filesystem::remove(path);
  }
  const std::string path;
};

std::set<std::string> buffer_names(const torch::nn::Module& module) {
  std::set<std::string> names;
  for (const auto& buffer : module.named_buffers()) {
    names.insert(buffer.key());
  }
  return names;
}

template <typename Loss>
void expect_same_options(Loss& loss, Loss& other) {
  const auto ours = loss->saved_numbers();
  const auto theirs = other->saved_numbers();
  for (size_t i = 0; i < ours.size(); ++i) {
    EXPECT_EQ(*ours[i].value, *theirs[i].value) << loss->name() << " " << ours[i].name;
    EXPECT_EQ(other->named_buffers()[ours[i].name].template item<double>(), *ours[i].value) << ours[i].name;
  }
}

TEST(ModulesNumbers, AreBuffersUnderTheConstructorsNames) {
  const std::map<std::string, std::set<std::string>> expected{
      {"SoftmaxLossImpl", {"scale"}},
      {"ModifiedSoftmaxLossImpl", {"scale"}},
      {"NormalizedSoftmaxLossImpl", {"scale"}},
      {"SphereFaceLossImpl", {"scale", "margin", "lambda_base", "lambda_gamma", "lambda_min", "step"}},
      {"LargeMarginSoftmaxLossImpl", {"scale", "margin", "lambda_base", "lambda_gamma", "lambda_min", "step"}},
      {"CosFaceLossImpl", {"scale", "margin"}},
      {"ArcFaceLossImpl", {"scale", "margin"}},
      {"CombinedMarginLossImpl", {"scale", "m1", "m2", "m3"}},
      {"AdaFaceLossImpl", {"scale", "margin", "h", "momentum", "length_mean", "length_std"}},
      {"MagFaceLossImpl", {"scale", "a_min", "a_max", "m_min", "m_max", "regularizer"}},
      {"ElasticFaceLossImpl", {"scale", "margin", "deviation"}},
      {"SubCenterArcFaceLossImpl", {"scale", "margin"}},
      {"CurricularFaceLossImpl", {"scale", "margin", "momentum", "t"}},
      {"MVSoftmaxLossImpl", {"scale", "margin", "t"}},
      {"InterTopKArcFaceLossImpl", {"scale", "margin", "hardest_margin"}},
      {"SphereFace2LossImpl", {"scale", "margin", "t", "positive_weight"}},
      {"UniFaceLossImpl", {"scale", "margin"}}};
  with_every_loss([&](auto loss) {
    const std::string name = loss->name().substr(loss->name().rfind(':') + 1);
    EXPECT_EQ(buffer_names(*loss), expected.at(name)) << name;
    for (const nn::SavedNumber& number : loss->saved_numbers()) {
      const torch::Tensor buffer = loss->named_buffers()[number.name];
      EXPECT_EQ(buffer.scalar_type(), torch::kFloat64);
      EXPECT_EQ(buffer.dim(), 0);
      EXPECT_EQ(buffer.item<double>(), *number.value);
    }
  });
}

TEST(ModulesNumbers, ComeBackFromArchivesAndStateDicts) {
  const TemporaryFile file("numbers");
  with_every_loss([&](auto loss) {
    using Loss = decltype(loss);
    const auto options = loss->options;
    shrink_numbers(loss);
    std::stringstream archive;
    torch::save(loss, archive);
    Loss of_archive(options);
    torch::load(of_archive, archive);
    expect_same_options(loss, of_archive);
    torchmargin::save_state_dict(*loss, file.path);
    Loss of_file(options);
    torchmargin::load_state_dict(*of_file, file.path);
    expect_same_options(loss, of_file);
    EXPECT_TRUE(torch::equal(of_file->weight, loss->weight));
    Loss copy(std::dynamic_pointer_cast<typename Loss::ContainedType>(loss->clone()));
    expect_same_options(loss, copy);
    *copy->saved_numbers()[0].value = 3.0;
    EXPECT_NE(*loss->saved_numbers()[0].value, 3.0);
  });
}

TEST(ModulesNumbers, ComeBackInsideAModel) {
  const TemporaryFile file("model");
  auto model = std::make_shared<ModelImpl<nn::ArcFaceLoss>>(nn::ArcFaceLoss(6, 21));
  model->head->options.margin(0.1).scale(8);
  std::stringstream archive;
  torch::save(model, archive);
  torchmargin::save_state_dict(*model, file.path);
  auto of_archive = std::make_shared<ModelImpl<nn::ArcFaceLoss>>(nn::ArcFaceLoss(6, 21));
  torch::load(of_archive, archive);
  expect_same_options(model->head, of_archive->head);
  EXPECT_EQ(of_archive->head->options.margin(), 0.1);
  auto of_file = std::make_shared<ModelImpl<nn::ArcFaceLoss>>(nn::ArcFaceLoss(6, 21));
  torchmargin::load_state_dict(*of_file, file.path);
  EXPECT_EQ(of_file->head->options.margin(), 0.1);
  EXPECT_TRUE(torch::equal(of_file->linear->weight, model->linear->weight));
  const auto copy = std::dynamic_pointer_cast<ModelImpl<nn::ArcFaceLoss>>(model->clone());
  EXPECT_EQ(copy->head->options.scale(), 8.0);
}

// What other libraries, and this one before it saved numbers, wrote: the weight and the state, no numbers.
TEST(ModulesNumbers, StayWhereNothingWasSaved) {
  const TemporaryFile file("without_numbers");
  with_every_loss([&](auto loss) {
    shrink_numbers(loss);
    const std::string before = printed(loss);
    const torch::Tensor weight = torch::randn_like(loss->weight.detach());
    torch::serialize::OutputArchive output;
    torch::nn::Module plain;
    const auto add = [&](const std::string& name, const torch::Tensor& tensor, bool is_buffer) {
      output.write(name, tensor, is_buffer);
      plain.register_buffer(name, tensor);
    };
    add("weight", weight, false);
    if (loss->bias.defined()) {
      add("bias", torch::zeros_like(loss->bias.detach()), false);
    }
    for (const auto& buffer : loss->named_buffers()) {
      const auto numbers = loss->saved_numbers();
      const bool state = std::none_of(
          numbers.begin(), numbers.end(), [&](const nn::SavedNumber& number) { return number.name == buffer.key(); });
      if (state) {
        add(buffer.key(), torch::full({}, 7, buffer.value().options()), true);
      }
    }
    std::stringstream stream;
    output.save_to(stream);
    torch::load(loss, stream);
    EXPECT_TRUE(torch::equal(loss->weight, weight));
    EXPECT_EQ(printed(loss), before);
    loss->weight.data().zero_();
    torchmargin::save_state_dict(plain, file.path);
    torchmargin::load_state_dict(*loss, file.path);
    EXPECT_TRUE(torch::equal(loss->weight, weight));
    EXPECT_EQ(printed(loss), before);
    for (const auto& buffer : loss->named_buffers()) {
      if (buffer.key() == "step" || buffer.key() == "length_mean") {
        EXPECT_EQ(buffer.value().template item<double>(), 7.0);
      }
    }
  });
}

TEST(ModulesNumbers, BadOnesAreRefusedAndNothingIsChanged) {
  const TemporaryFile file("bad_numbers");
  const auto write = [&](const torch::Tensor& margin) {
    torch::serialize::OutputArchive archive;
    torch::nn::Module module;
    archive.write("weight", torch::ones({21, 6}));
    archive.write("scale", torch::full({}, 8.0), /*is_buffer=*/true);
    archive.write("margin", margin, /*is_buffer=*/true);
    module.register_buffer("weight", torch::ones({21, 6}));
    module.register_buffer("scale", torch::full({}, 8.0));
    module.register_buffer("margin", margin);
    torchmargin::save_state_dict(module, file.path);
    auto stream = std::make_shared<std::stringstream>();
    archive.save_to(*stream);
    return stream;
  };
  nn::ArcFaceLoss loss(6, 21);
  nn::ElasticFaceLoss elastic(6, 21);
  const torch::Tensor weight = loss->weight.detach().clone();
  const torch::Tensor many = torch::full({21}, 0.3);
  many[3] = kNaN;
  const std::vector<std::pair<torch::Tensor, std::string>> cases{
      {torch::full({}, 28.6), "expected margin in radians, not degrees"},
      {torch::full({1}, 0.5), "expected 'margin' to have shape [] or [21], but got [1]"},
      {many, "expected class_margins to be finite and at most pi in size"}};
  for (const auto& [margin, text] : cases) {
    const auto archive = write(margin);
    EXPECT_ERROR(text, torch::load(loss, *archive); archive->seekg(0));
    EXPECT_ERROR(text, torchmargin::load_state_dict(*loss, file.path));
    EXPECT_TRUE(torch::equal(loss->weight, weight));
    EXPECT_EQ(loss->options.margin(), 0.5);
    EXPECT_EQ(loss->options.scale(), 64.0);
    EXPECT_FALSE(loss->options.class_margins().defined());
    EXPECT_EQ(loss->named_buffers()["scale"].item<double>(), 64.0);
  }
  EXPECT_ERROR("expected 'margin' to have shape [], but", torchmargin::load_state_dict(*elastic, file.path));
  loss->options.margin(28.6); // and it is not written either
  EXPECT_ERROR("expected margin in radians", torchmargin::save_state_dict(*loss, file.path));
  std::stringstream stream;
  EXPECT_ERROR("expected margin in radians", torch::save(loss, stream));
}

TEST(ModulesNumbers, AnArchiveOfAnotherShapeIsRefused) {
  std::stringstream archive;
  torch::save(nn::ArcFaceLoss(6, 22), archive);
  nn::ArcFaceLoss loss(6, 21);
  EXPECT_ERROR("expected 'weight' to have shape [21, 6]", torch::load(loss, archive); archive.seekg(0));
  std::stringstream without;
  torch::save(nn::ArcFaceLoss(6, 21), without);
  nn::AdaFaceLoss adaface(6, 21);
  EXPECT_ERROR("length_mean", torch::load(adaface, without); without.seekg(0));
}

TEST(ModulesNumbers, CastsLeaveNumbersAndStateAsWideAsTheyAre) {
  for (const torch::Dtype dtype : {torch::kHalf, torch::kBFloat16, torch::kFloat32, torch::kFloat64}) {
    with_every_loss([&](auto loss) {
      shrink_numbers(loss);
      loss->write_numbers();
      auto model = std::make_shared<ModelImpl<decltype(loss)>>(loss);
      model->to(dtype);
      loss->to(torch::kCPU, dtype);
      for (auto cast : {model->head, loss}) {
        EXPECT_EQ(cast->weight.scalar_type(), dtype);
        for (const auto& buffer : cast->named_buffers()) {
          bool statistic = true; // what is no number of the options
          for (const nn::SavedNumber& number : cast->saved_numbers()) {
            statistic = statistic && number.name != buffer.key();
          }
          const torch::Dtype kept = buffer.key() == "step" ? torch::kInt64
              : statistic                                  ? torch::kFloat32
                                                           : torch::kFloat64;
          EXPECT_EQ(buffer.value().scalar_type(), kept) << buffer.key();
        }
        expect_same_options(loss, cast);
      }
    });
  }
  nn::AdaFaceLoss loss(6, 21);
  loss->length_mean.fill_(20.123456);
  const torch::Tensor mean = loss->length_mean.clone();
  loss->to(torch::kBFloat16);
  EXPECT_TRUE(torch::equal(loss->length_mean, mean));
}

TEST(ModulesNumbers, AnnealingGoesOnInSixteenBits) {
  nn::SphereFaceLoss loss(6, 21);
  loss->to(torch::kBFloat16);
  const Batch b;
  for (int step = 0; step < 300; ++step) { // bfloat16 would stop at 256
    loss->forward(b.embeddings.detach().to(torch::kBFloat16), b.labels);
  }
  EXPECT_EQ(loss->step.item<int64_t>(), 300);
}

} // namespace
