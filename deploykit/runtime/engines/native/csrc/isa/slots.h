/* Find the slots of 16 positions in a decoder's cache. */

/* Return a mask of the first ``left`` of 16. */
INLINE uint32_t tail(int left) { return left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0; }

/* Return the slot of the first position in ``left``, a mask of 16; set ``its`` to the mask of positions in that slot. */
INLINE int64_t slot_of(const int32_t *table, uint32_t left, uint32_t *its) {
    int slot = table[__builtin_ctz(left)];
    *its = left & i_equal(table, slot);
    return slot;
}

/* Loop over the slots of the 16 positions from ``t`` on (one slot without a table). ``its`` is the mask of the slot's
 * positions, ``from`` the position that the first of the 16 would have in the slot. */
#define EACH_SLOT(t) \
    for (uint32_t left = tail(n - (t)), its = left; left; left &= ~its) \
        for (int64_t from = (t) + (table ? slot_of(table + (t), left, &its) * stride : 0), once = 1; once; once = 0)
