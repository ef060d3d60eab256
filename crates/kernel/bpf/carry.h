/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * What programs of an earlier version left in sockets and between SYN and accept, while or after these programs
 * take over from them (src/maps.rs): looked up on a miss only, and converted field by field. The plans say for
 * each byte of our struct where in the earlier one it is, plus one; 0: nowhere, the field is new. They are
 * constants when the programs are loaded, so the verifier sees plain copies, and nothing at all without an
 * earlier version.
 *
 * Two rules keep old and new programs in step while links are replaced one by one (src/attach.rs has the order):
 * programs that only read a socket's state convert into a buffer of their own, since an earlier version's program
 * may still write to its state; those that write it keep what they converted. When all links are replaced, the
 * loader replaces them once more, with programs that know it: from then on any packet moves a socket's state.
 */
#pragma once

#include "maps.h"

/* A pointer that comes from one of several places: without this, optimisers compute the addresses of its fields
 * before they know that it is not null, which the verifier refuses. */
#define OPAQUE(pointer) asm volatile("" : "+r"(pointer))

#define CARRY_SOCKETS 1   /* sockets_before: the version before this one */
#define CARRY_SOCKETS_2 2 /* sockets_before_2: the version before that */
#define CARRY_HANDSHAKES 4
#define CARRY_HANDSHAKES_2 8
#define CARRY_SETTLED 16 /* no earlier program is attached any more */

/* Room for structs to grow; the loader refuses larger ones. */
#define CARRY_BYTES 256

const volatile __u32 carries = 0;
const volatile __u16 carry_sockets[CARRY_BYTES] = {};
const volatile __u16 carry_sockets_2[CARRY_BYTES] = {};
const volatile __u16 carry_grant[CARRY_BYTES] = {};
const volatile __u16 carry_grant_2[CARRY_BYTES] = {};

_Static_assert(sizeof(struct socket_state) <= CARRY_BYTES, "the plan has no room");

static __always_inline void carry_bytes(__u8 *to, __u32 size, const __u8 *from,
					const volatile __u16 *plan)
{
#pragma clang loop unroll(disable)
	for (__u32 i = 0; i < size; i++) {
		__u16 at = plan[i];

		to[i] = at ? from[at - 1] : 0;
	}
}

static __always_inline int carried_state(struct bpf_sock *socket, struct socket_state *to)
{
	void *before;

	if (carries & CARRY_SOCKETS) {
		before = bpf_sk_storage_get(&sockets_before, socket, 0, 0);
		if (before) {
			carry_bytes((__u8 *)to, sizeof(*to), before, carry_sockets);
			return 1;
		}
	}
	if (carries & CARRY_SOCKETS_2) {
		before = bpf_sk_storage_get(&sockets_before_2, socket, 0, 0);
		if (before) {
			carry_bytes((__u8 *)to, sizeof(*to), before, carry_sockets_2);
			return 1;
		}
	}
	return 0;
}

/* The socket's state, for a program that writes to it. */
static __always_inline struct socket_state *own_state(struct bpf_sock *socket)
{
	struct socket_state *state = bpf_sk_storage_get(&sockets, socket, 0, 0);
	struct socket_state carried = {};

	if (state || !carries || !carried_state(socket, &carried))
		return state;
	state = bpf_sk_storage_get(&sockets, socket, &carried, BPF_SK_STORAGE_GET_F_CREATE);
	if (!state)
		count(REASON_STATE_FULL);
	return state;
}

/* The socket's state, for a program that only reads it. */
static __always_inline struct socket_state *seen_state(struct bpf_sock *socket,
						       struct socket_state *buffer)
{
	struct socket_state *state;

	if (carries & CARRY_SETTLED)
		return own_state(socket);
	state = bpf_sk_storage_get(&sockets, socket, 0, 0);
	if (state)
		return state;
	return carries && carried_state(socket, buffer) ? buffer : 0;
}

/* The grant of a connection between SYN and accept. */
static __always_inline struct grant *find_grant(const struct tuple *t, struct grant *buffer)
{
	struct grant *grant = bpf_map_lookup_elem(&handshakes, t);
	void *before;

	if (grant)
		return grant;
	if (carries & CARRY_HANDSHAKES) {
		before = bpf_map_lookup_elem(&handshakes_before, t);
		if (before) {
			carry_bytes((__u8 *)buffer, sizeof(*buffer), before, carry_grant);
			return buffer;
		}
	}
	if (carries & CARRY_HANDSHAKES_2) {
		before = bpf_map_lookup_elem(&handshakes_before_2, t);
		if (before) {
			carry_bytes((__u8 *)buffer, sizeof(*buffer), before, carry_grant_2);
			return buffer;
		}
	}
	return 0;
}

static __always_inline void forget_grant(const struct tuple *t)
{
	bpf_map_delete_elem(&handshakes, t);
	if (carries & CARRY_HANDSHAKES)
		bpf_map_delete_elem(&handshakes_before, t);
	if (carries & CARRY_HANDSHAKES_2)
		bpf_map_delete_elem(&handshakes_before_2, t);
}
