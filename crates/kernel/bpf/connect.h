/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * connect() and unconnected datagrams: the decision is made here, before a packet exists.
 * getpeername() and recvmsg() then show the program the address that it asked for.
 * What is kept of datagrams is in datagram.h.
 */
#pragma once

#include <linux/in.h>

#include "carry.h"
#include "decide.h"
#include "datagram.h"
#include "flow.h"
#include "refuse.h"
#include "socket.h"

static __always_inline void read_v6(struct address *to, struct bpf_sock_addr *ctx)
{
	to->word[0] = CONTEXT_READ(ctx, user_ip6[0]);
	to->word[1] = CONTEXT_READ(ctx, user_ip6[1]);
	to->word[2] = CONTEXT_READ(ctx, user_ip6[2]);
	to->word[3] = CONTEXT_READ(ctx, user_ip6[3]);
}

static __always_inline void write_v4(struct bpf_sock_addr *ctx, const struct address *a, __u16 port)
{
	ctx->user_ip4 = a->word[3];
	ctx->user_port = bpf_htons(port);
}

static __always_inline void write_v6(struct bpf_sock_addr *ctx, const struct address *a, __u16 port)
{
	ctx->user_ip6[0] = a->word[0];
	ctx->user_ip6[1] = a->word[1];
	ctx->user_ip6[2] = a->word[2];
	ctx->user_ip6[3] = a->word[3];
	ctx->user_port = bpf_htons(port);
}

static __always_inline void report_refusal(struct bpf_sock_addr *ctx, const struct decision *d,
					   const struct grant *grant, __u8 protocol, __u8 socket_class)
{
	struct flow_event *event;

	count(d->reason);
	event = flow_begin(FLOW_REFUSED_CONNECT, grant);
	if (!event)
		return;
	event->cookie = bpf_get_socket_cookie(ctx);
	event->destination = d->destination;
	event->destination_port = d->port;
	event->reason = d->reason;
	event->protocol = protocol;
	event->socket_class = socket_class;
	flow_submit(event);
}

static __always_inline int refuse_socket(struct bpf_sock_addr *ctx, struct socket_state *state,
					 const struct decision *d, const struct grant *grant,
					 __u8 protocol)
{
	/* Nothing stops a program from sending a million refused datagrams a second. */
	if (protocol == IPPROTO_UDP && !record_refusal(state))
		count(d->reason);
	else
		report_refusal(ctx, d, grant, protocol, state->socket_class);
	return refuse_with(error_of(d->reason));
}

/* Keeps the decision about a connection, or a connected datagram socket, in the socket. */
static __always_inline void keep(struct socket_state *state, const struct decision *d,
				 const struct grant *grant)
{
	state->grant = *grant;
	/* What an earlier connection of the socket left in the splice goes when this one begins (tcp.h). */
	state->flags = SOCKET_ADMITTED | SOCKET_CLIENT | (state->flags & SOCKET_SPLICED);
	if (d->local)
		state->flags |= SOCKET_LOCAL;
	if (d->reply)
		state->flags |= SOCKET_REPLIES;
	if (d->captured)
		state->flags |= SOCKET_CAPTURED;
	if (d->port != grant->original_port || !address_equal(&d->destination, &grant->original))
		state->flags |= SOCKET_REDIRECTED;
}

/* Notes what an answer to one datagram must find. Returns a reason to refuse it, or REASON_NONE. */
static __always_inline __u16 expect_answer(struct bpf_sock *socket, const struct socket_state *state,
					   const struct question *question, const struct decision *d,
					   struct grant *grant)
{
	struct workload_entry *self = bpf_map_lookup_elem(&workloads, &state->workload);
	int redirected = d->port != grant->original_port ||
			 !address_equal(&d->destination, &grant->original);
	struct tuple t = {};

	/* Within the workload everything is let in: only the address that was asked must be known. */
	if (d->reply || (d->local && !redirected))
		return REASON_NONE;
	if (!note_peer(socket, d, grant))
		return REASON_PEERS_FULL;
	if (d->local || !self || !question->own_port)
		return REASON_NONE;
	t.source = address_is_v4(&d->destination) ? self->v4 : self->v6;
	t.source_port = question->own_port;
	t.destination = d->destination;
	t.destination_port = d->port;
	datagram_flow(&t, grant);
	return REASON_NONE;
}

#define SOL_SOCKET 1
#define SO_MARK 36

/* Whoever lists the node's sockets to find those that must not go on is shown a TCP socket's storage, but not a datagram
 * socket's. What is needed of a connected one's is its mark as well: programs in a workload cannot change it, no route
 * looks at it, and packets lose it where they leave the workload. */
static __always_inline int mark_datagrams(struct bpf_sock_addr *ctx, struct bpf_sock *socket,
					  const struct decision *d, const struct grant *grant)
{
	__u32 mark = d->reply ? MARK_REPLIES : grant->service;

	if (socket->mark == mark)
		return 1;
	return !bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));
}

/* Returns 1 with *d to apply, or 0 after having refused. *d holds the asked-for address on entry. */
static __always_inline int route_socket(struct bpf_sock_addr *ctx, enum call call,
					struct decision *d)
{
	struct bpf_sock *socket = ctx->sk;
	struct question question = { .call = call };
	struct grant grant = {};
	struct socket_state *state;

	question.protocol = CONTEXT_READ(ctx, type) == 1 ? IPPROTO_TCP : IPPROTO_UDP;
	if (!socket)
		return refuse_with(EACCES);
	state = own_state(socket);
	grant.original = d->destination;
	grant.original_port = d->port;
	if (!state || state->socket_class == CLASS_NONE) {
		d->reason = REASON_NO_IDENTITY;
		report_refusal(ctx, d, &grant, question.protocol, CLASS_NONE);
		return refuse_with(EACCES);
	}
	if (state->socket_class == CLASS_AGENT) {
		if (call == CALL_CONNECT)
			state->flags = SOCKET_ADMITTED | SOCKET_LOCAL | SOCKET_CLIENT;
		return 1;
	}
	question.draw = bpf_get_prandom_u32();
	if (question.protocol == IPPROTO_UDP) {
		question.own_port = socket->src_port;
		/* One socket's datagrams to one service go to one endpoint while its table stays. */
		if (call == CALL_SENDMSG)
			question.draw = (__u32)bpf_get_socket_cookie(ctx) * 0x9e3779b1;
	}
	decide(state, &question, d, &grant);
	if (d->action == ACTION_DENY) {
		if (call == CALL_CONNECT)
			state->flags &= SOCKET_SPLICED;
		return refuse_socket(ctx, state, d, &grant, question.protocol);
	}
	grant.start_ns = bpf_ktime_get_ns();
	grant.reason = d->reason;
	if (call == CALL_CONNECT) {
		if (question.protocol == IPPROTO_UDP && !mark_datagrams(ctx, socket, d, &grant)) {
			d->reason = REASON_STATE_FULL;
			state->flags = 0;
			return refuse_socket(ctx, state, d, &grant, question.protocol);
		}
		keep(state, d, &grant);
		return 1;
	}
	d->reason = expect_answer(socket, state, &question, d, &grant);
	if (d->reason != REASON_NONE)
		return refuse_socket(ctx, state, d, &grant, question.protocol);
	return 1;
}

static __always_inline int route_v4(struct bpf_sock_addr *ctx, enum call call)
{
	struct decision d = {};

	address_from_v4(&d.destination, CONTEXT_READ(ctx, user_ip4));
	d.port = bpf_ntohs((__u16)CONTEXT_READ(ctx, user_port));
	if (!route_socket(ctx, call, &d))
		return 0;
	write_v4(ctx, &d.destination, d.port);
	return 1;
}

static __always_inline int route_v6(struct bpf_sock_addr *ctx, enum call call)
{
	struct decision d = {};

	read_v6(&d.destination, ctx);
	d.port = bpf_ntohs((__u16)CONTEXT_READ(ctx, user_port));
	if (!route_socket(ctx, call, &d))
		return 0;
	write_v6(ctx, &d.destination, d.port);
	return 1;
}

SEC("cgroup/connect4")
int heddle_connect4(struct bpf_sock_addr *ctx)
{
	return route_v4(ctx, CALL_CONNECT);
}

SEC("cgroup/connect6")
int heddle_connect6(struct bpf_sock_addr *ctx)
{
	return route_v6(ctx, CALL_CONNECT);
}

SEC("cgroup/sendmsg4")
int heddle_sendmsg4(struct bpf_sock_addr *ctx)
{
	return route_v4(ctx, CALL_SENDMSG);
}

SEC("cgroup/sendmsg6")
int heddle_sendmsg6(struct bpf_sock_addr *ctx)
{
	return route_v6(ctx, CALL_SENDMSG);
}

/* The state whose original address should be shown instead of the real one, or null. */
static __always_inline struct socket_state *redirected(struct bpf_sock *socket,
						       struct socket_state *buffer)
{
	struct socket_state *state = socket ? seen_state(socket, buffer) : 0;

	if (!state)
		return 0;
	OPAQUE(state);
	return state->flags & SOCKET_REDIRECTED ? state : 0;
}

SEC("cgroup/getpeername4")
int heddle_getpeername4(struct bpf_sock_addr *ctx)
{
	struct socket_state buffer = {};
	struct socket_state *state = redirected(ctx->sk, &buffer);

	if (state && address_is_v4(&state->grant.original))
		write_v4(ctx, &state->grant.original, state->grant.original_port);
	return 1;
}

SEC("cgroup/getpeername6")
int heddle_getpeername6(struct bpf_sock_addr *ctx)
{
	struct socket_state buffer = {};
	struct socket_state *state = redirected(ctx->sk, &buffer);

	if (state)
		write_v6(ctx, &state->grant.original, state->grant.original_port);
	return 1;
}

/* Turns the sender of a datagram, in *from and *port, into the address that was asked. Returns whether it differs. */
static __always_inline int show_sender(struct bpf_sock *socket, struct address *from, __u16 *port)
{
	struct socket_state buffer = {}, *state;
	struct peer *peer;

	if (!socket)
		return 0;
	if (socket->state == BPF_TCP_ESTABLISHED) { /* so says the kernel of a connected one */
		state = redirected(socket, &buffer);
		if (!state)
			return 0;
		*from = state->grant.original;
		*port = state->grant.original_port;
		return 1;
	}
	peer = find_peer(socket, from, *port, bpf_ktime_get_ns());
	if (!peer)
		return 0;
	*from = peer->original;
	*port = peer->original_port;
	return 1;
}

SEC("cgroup/recvmsg4")
int heddle_recvmsg4(struct bpf_sock_addr *ctx)
{
	__u16 port = bpf_ntohs((__u16)CONTEXT_READ(ctx, user_port));
	struct address from;

	address_from_v4(&from, CONTEXT_READ(ctx, user_ip4));
	if (show_sender(ctx->sk, &from, &port) && address_is_v4(&from))
		write_v4(ctx, &from, port);
	return 1;
}

SEC("cgroup/recvmsg6")
int heddle_recvmsg6(struct bpf_sock_addr *ctx)
{
	__u16 port = bpf_ntohs((__u16)CONTEXT_READ(ctx, user_port));
	struct address from;

	read_v6(&from, ctx);
	if (show_sender(ctx->sk, &from, &port))
		write_v6(ctx, &from, port);
	return 1;
}
