/* Which of 16 positions lie in which slot of a decoder's cache. */

/* A mask of the first ``left`` of 16. */
INLINE uint32_t tail(int left) { return left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0; }

/* The slot of the first of the positions ``left``, a mask of 16; ``its`` becomes the mask of those in the same slot. */
INLINE int64_t slot_of(const int32_t *table, uint32_t left, uint32_t *its) {
    int slot = table[__builtin_ctz(left)];
    *its = left & i_equal(table, slot);
    return slot;
}

/* For the 16 positions from ``t``, once for each slot that they lie in (without a table there is one): ``its``, the mask of
 * its positions, and ``from``, where the first of the 16 would lie. */
#define EACH_SLOT(t) \
    for (uint32_t left = tail(n - (t)), its = left; left; left &= ~its) \
        for (int64_t from = (t) + (table ? slot_of(table + (t), left, &its) * stride : 0), once = 1; once; once = 0)
