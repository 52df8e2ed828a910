#include "quaver/philox.h"
#include "test.h"

using namespace quaver;

// The known answers that Random123 publishes for philox4x32-10.
TEST(known_answers) {
  const Philox4 zeros = philox4x32(0, 0, 0);
  CHECK_EQ(zeros.word[0], 0x6627e8d5u);
  CHECK_EQ(zeros.word[1], 0xe169c58du);
  CHECK_EQ(zeros.word[2], 0xbc57ac4cu);
  CHECK_EQ(zeros.word[3], 0x9b00dbd8u);
  const Philox4 ones = philox4x32(~0ull, ~0ull, ~0ull);
  CHECK_EQ(ones.word[0], 0x408f276du);
  CHECK_EQ(ones.word[1], 0x41c83b0eu);
  CHECK_EQ(ones.word[2], 0xa20bc7c6u);
  CHECK_EQ(ones.word[3], 0x6d5451fdu);
  // counter 243f6a88 85a308d3 13198a2e 03707344, key a4093822 299f31d0
  const Philox4 pi =
      philox4x32(0x299f31d0a4093822ull, 0x85a308d3243f6a88ull, 0x0370734413198a2eull);
  CHECK_EQ(pi.word[0], 0xd16cfe09u);
  CHECK_EQ(pi.word[1], 0x94fdccebu);
  CHECK_EQ(pi.word[2], 0x5001e420u);
  CHECK_EQ(pi.word[3], 0x24126ea1u);
}

TEST(an_element_has_its_own_word) {
  for (uint64_t i = 0; i < 64; ++i) CHECK_EQ(random_bits(7, i), philox4x32(7, i / 4).word[i % 4]);
  CHECK(random_bits(7, 5) != random_bits(8, 5));
  CHECK(random_bits(7, 5) != random_bits(7, (1ull << 34) + 5));
}
