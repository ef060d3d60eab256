/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * The agent's ports: no program of a workload may bind them. One that did could join the group that the agent's
 * listeners share (SO_REUSEPORT), and be handed connections that are not its own.
 */
#pragma once

#include <linux/in.h>

#include "address.h"
#include "carry.h"
#include "refuse.h"

static __always_inline int may_bind(struct bpf_sock_addr *ctx)
{
	__u16 port = bpf_ntohs((__u16)CONTEXT_READ(ctx, user_port));
	struct socket_state buffer = {}, *state;
	struct bpf_sock *socket;

	if (port != PORT_OUTBOUND && port != PORT_INBOUND && port != PORT_HBONE)
		return 1;
	if (CONTEXT_READ(ctx, protocol) != IPPROTO_TCP)
		return 1;
	socket = ctx->sk;
	state = socket ? seen_state(socket, &buffer) : 0;
	if (state) {
		OPAQUE(state);
		if (state->socket_class == CLASS_AGENT)
			return 1;
	}
	count(REASON_RESERVED_PORT);
	return refuse_with(EACCES);
}

SEC("cgroup/bind4")
int heddle_bind4(struct bpf_sock_addr *ctx)
{
	return may_bind(ctx);
}

SEC("cgroup/bind6")
int heddle_bind6(struct bpf_sock_addr *ctx)
{
	return may_bind(ctx);
}
