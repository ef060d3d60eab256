/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * Addresses in the one form that all maps use, and what they say about themselves.
 */
#pragma once

#include <bpf/bpf_endian.h>

#include "types.h"

#define AF_INET 2
#define AF_INET6 10

/*
 * Reads a context field. Optimisers fold two reads in different branches into one read through a
 * computed pointer, which the verifier refuses; an instruction of its own stays as it is.
 */
#define CONTEXT_READ_AS(type, ctx, field)                                                          \
	({                                                                                         \
		__##type value_;                                                                   \
		_Static_assert(sizeof((ctx)->field) == sizeof(value_), "wrong width");             \
		asm volatile("%0 = *(" #type " *)(%1 + %2)"                                        \
			     : "=r"(value_)                                                        \
			     : "r"(ctx), "i"(__builtin_offsetof(typeof(*(ctx)), field)));          \
		value_;                                                                            \
	})
#define CONTEXT_READ(ctx, field) CONTEXT_READ_AS(u32, ctx, field)
#define CONTEXT_READ_64(ctx, field) CONTEXT_READ_AS(u64, ctx, field)

static __always_inline void address_from_v4(struct address *to, __u32 v4)
{
	to->word[0] = 0;
	to->word[1] = 0;
	to->word[2] = bpf_htonl(0xffff);
	to->word[3] = v4;
}

static __always_inline int address_is_v4(const struct address *a)
{
	return a->word[0] == 0 && a->word[1] == 0 && a->word[2] == bpf_htonl(0xffff);
}

static __always_inline int address_equal(const struct address *a, const struct address *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] &&
	       a->word[3] == b->word[3];
}

/* 127/8, ::1, and the unspecified address (connecting to it means loopback). */
static __always_inline int address_is_loopback(const struct address *a)
{
	if (address_is_v4(a))
		return (a->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000) ||
		       a->word[3] == 0;
	return a->word[0] == 0 && a->word[1] == 0 && a->word[2] == 0 &&
	       (a->word[3] == bpf_htonl(1) || a->word[3] == 0);
}

static __always_inline __u32 address_family(const struct address *a)
{
	return address_is_v4(a) ? FAMILY_V4 : FAMILY_V6;
}
