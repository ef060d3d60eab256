/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * The life of a TCP connection: the grant is published before the SYN leaves, taken over by the server's
 * socket when it is established, and turned into one flow record when the client's socket closes.
 */
#pragma once

#include "carry.h"
#include "flow.h"
#include "socket.h"
#include "splice.h"

static __always_inline void ops_addresses(struct bpf_sock_ops *ops, struct address *local,
					  struct address *remote)
{
	if (CONTEXT_READ(ops, family) == AF_INET) {
		address_from_v4(local, CONTEXT_READ(ops, local_ip4));
		address_from_v4(remote, CONTEXT_READ(ops, remote_ip4));
		return;
	}
	local->word[0] = CONTEXT_READ(ops, local_ip6[0]);
	local->word[1] = CONTEXT_READ(ops, local_ip6[1]);
	local->word[2] = CONTEXT_READ(ops, local_ip6[2]);
	local->word[3] = CONTEXT_READ(ops, local_ip6[3]);
	remote->word[0] = CONTEXT_READ(ops, remote_ip6[0]);
	remote->word[1] = CONTEXT_READ(ops, remote_ip6[1]);
	remote->word[2] = CONTEXT_READ(ops, remote_ip6[2]);
	remote->word[3] = CONTEXT_READ(ops, remote_ip6[3]);
}

/* The connection as its client sees it. */
static __always_inline void client_tuple(struct bpf_sock_ops *ops, int is_client, struct tuple *t)
{
	__u16 local = CONTEXT_READ(ops, local_port), remote = bpf_ntohl(CONTEXT_READ(ops, remote_port));

	if (is_client) {
		ops_addresses(ops, &t->source, &t->destination);
		t->source_port = local;
		t->destination_port = remote;
	} else {
		ops_addresses(ops, &t->destination, &t->source);
		t->source_port = remote;
		t->destination_port = local;
	}
}

static __always_inline void publish_grant(struct bpf_sock_ops *ops, struct socket_state *state)
{
	int flags = BPF_SOCK_OPS_STATE_CB_FLAG;
	struct tuple t = {};
	struct grant grant;

	if ((state->flags & SOCKET_LOCAL) && !(state->flags & SOCKET_PUBLISHES))
		return;
	client_tuple(ops, 1, &t);
	grant = state->grant;
	/* Without the entry the server's side refuses the SYN: full means closed. The next SYN tries again. */
	if (bpf_map_update_elem(&handshakes, &t, &grant, BPF_ANY)) {
		count(REASON_HANDSHAKES_FULL);
		flags |= BPF_SOCK_OPS_RTO_CB_FLAG;
	}
	bpf_sock_ops_cb_flags_set(ops, flags);
}

static __always_inline __u64 without(__u64 bytes, int counted)
{
	return counted && bytes ? bytes - 1 : bytes;
}

static __always_inline void report(struct bpf_sock_ops *ops, struct socket_state *state, __u8 kind)
{
	int is_client = state->flags & SOCKET_CLIENT;
	struct bpf_sock *socket = ops->sk;
	struct flow_event *event;
	struct tuple t = {};
	__u64 sent, received;

	if (state->flags & SOCKET_LOCAL)
		return;
	client_tuple(ops, is_client, &t);
	event = flow_begin(kind, &state->grant);
	if (!event)
		return;
	event->cookie = bpf_get_socket_cookie(ops);
	event->source = t.source;
	event->destination = t.destination;
	event->source_port = t.source_port;
	event->destination_port = t.destination_port;
	event->protocol = IPPROTO_TCP;
	event->socket_class = state->socket_class;
	event->flags = state->flags;
	sent = without(CONTEXT_READ_64(ops, bytes_acked), is_client);
	sent = without(sent, state->flags & SOCKET_FIN_ACKED);
	received = without(CONTEXT_READ_64(ops, bytes_received),
			   state->flags & SOCKET_FIN_RECEIVED);
	event->bytes_sent = is_client ? sent : received;
	event->bytes_received = is_client ? received : sent;
	event->srtt_us = CONTEXT_READ(ops, srtt_us) >> 3; /* the kernel keeps it times eight */
	event->retransmits = CONTEXT_READ(ops, total_retrans);
	if (socket && (state->flags & SOCKET_SPLICED))
		splice_report(socket, event);
	flow_submit(event);
}

static __always_inline void accept_grant(struct bpf_sock_ops *ops, struct bpf_sock *socket,
					 struct socket_state *state)
{
	struct grant carried = {}, *grant;
	struct address_entry *known;
	struct tuple t = {};

	/* The state is a copy of the listener's: nothing of the connection is in it yet. */
	state->flags = SOCKET_ESTABLISHED | SOCKET_ADMITTED;
	client_tuple(ops, 0, &t);
	if (address_is_loopback(&t.source) || address_is_loopback(&t.destination) ||
	    address_equal(&t.source, &t.destination)) {
		state->flags |= SOCKET_LOCAL;
		return;
	}
	grant = find_grant(&t, &carried);
	if (grant) {
		OPAQUE(grant);
		state->grant = *grant;
		forget_grant(&t);
		/* From the agent, which judges, records and ends it. */
		if (!state->grant.source_workload)
			state->flags |= SOCKET_LOCAL;
		splice_enter(ops, socket, state, &t);
		return;
	}
	known = bpf_map_lookup_elem(&addresses, &t.source);
	if (known && (known->flags & ADDRESS_LOCAL)) {
		/* No handshake of this node's workloads gets here. Nothing that it sends is let in. */
		state->flags = SOCKET_ESTABLISHED;
		count(REASON_PEER_NOT_ATTESTED);
		return;
	}
	/* Admitted at ingress without a grant: an anonymous peer. This side makes the flow record. */
	__builtin_memset(&state->grant, 0, sizeof(state->grant));
	state->grant.start_ns = bpf_ktime_get_ns();
	state->grant.destination_workload = state->workload;
	bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG);
	report(ops, state, FLOW_OPENED);
}

/* The agent connects to a program for a client of another node. Any other connection of the agent's needs no grant. */
static __always_inline void begin_delivery(struct bpf_sock_ops *ops, struct bpf_sock *socket,
					   struct socket_state *state)
{
	__u32 mark = socket->mark;
	struct tuple t = {};

	state->flags = SOCKET_ADMITTED | SOCKET_LOCAL | SOCKET_CLIENT;
	if ((mark & DELIVERY_MASK) != DELIVERY_MARK)
		return;
	client_tuple(ops, 1, &t);
	__builtin_memset(&state->grant, 0, sizeof(state->grant));
	state->grant.start_ns = bpf_ktime_get_ns();
	state->grant.original = t.destination;
	state->grant.original_port = t.destination_port;
	state->grant.destination_workload = mark & ~DELIVERY_MASK;
	state->grant.reason = REASON_DELIVERED;
	state->flags |= SOCKET_DELIVERS;
}

/* The agent accepts: what was captured has a grant with a target, anything else has not. */
static __always_inline void accept_captured(struct bpf_sock_ops *ops, struct socket_state *state)
{
	struct grant carried = {}, *grant;
	struct tuple t = {};

	/* The state is a copy of the listener's: nothing of the connection is in it yet. */
	state->flags = SOCKET_ESTABLISHED | SOCKET_ADMITTED | SOCKET_LOCAL;
	client_tuple(ops, 0, &t);
	__builtin_memset(&state->grant, 0, sizeof(state->grant));
	grant = find_grant(&t, &carried);
	if (!grant)
		return;
	OPAQUE(grant);
	/* Another workload's program may call this one's ports, the agent's as well. */
	if (grant->target_port)
		state->grant = *grant;
	forget_grant(&t);
}

/* Notes whose FIN has been counted. After a reset in the middle of a close it may be one too many. */
static __always_inline void note_fin(struct socket_state *state, __u32 from, __u32 to)
{
	if (to == BPF_TCP_FIN_WAIT2 || (to == BPF_TCP_CLOSE && (from == BPF_TCP_LAST_ACK ||
								from == BPF_TCP_CLOSING)))
		state->flags |= SOCKET_FIN_ACKED;
	if (to == BPF_TCP_CLOSE_WAIT || to == BPF_TCP_CLOSING ||
	    (to == BPF_TCP_CLOSE && from == BPF_TCP_FIN_WAIT2))
		state->flags |= SOCKET_FIN_RECEIVED;
}

static __always_inline void on_close(struct bpf_sock_ops *ops, struct bpf_sock *socket,
				     struct socket_state *state)
{
	__u32 spliced = state->flags & SOCKET_SPLICED;

	/* A spliced connection has a client that makes the record. */
	if (!spliced || (state->flags & SOCKET_CLIENT))
		report(ops, state, FLOW_CLOSED);
	if (spliced)
		splice_end(socket);
	if ((state->flags & SOCKET_CLIENT) && !(state->flags & SOCKET_ESTABLISHED)) {
		struct tuple t = {};

		client_tuple(ops, 1, &t);
		forget_grant(&t);
	}
	/* The socket may be used again: it has to ask again. */
	state->flags = spliced;
}

SEC("sockops")
int heddle_sockops(struct bpf_sock_ops *ops)
{
	__u32 op = CONTEXT_READ(ops, op);
	struct bpf_sock *socket = ops->sk;
	struct socket_state *state;
	struct tuple t = {};

	if (op != BPF_SOCK_OPS_TCP_CONNECT_CB && op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB &&
	    op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB && op != BPF_SOCK_OPS_TCP_LISTEN_CB &&
	    op != BPF_SOCK_OPS_STATE_CB && op != BPF_SOCK_OPS_RTO_CB &&
	    op != BPF_SOCK_OPS_HDR_OPT_LEN_CB)
		return 1;
	if (!socket)
		return 1;
	state = own_state(socket);
	if (!state)
		return 1;
	switch (op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		if (state->flags & SOCKET_SPLICED)
			splice_forget(socket);
		state->flags &= ~SOCKET_SPLICED;
		if (state->socket_class == CLASS_AGENT)
			begin_delivery(ops, socket, state);
		publish_grant(ops, state);
		break;
	case BPF_SOCK_OPS_RTO_CB:
		/* Asked for only by one whose handshake found no room. */
		if (!(state->flags & SOCKET_ESTABLISHED))
			publish_grant(ops, state);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		state->flags |= SOCKET_ESTABLISHED;
		client_tuple(ops, 1, &t);
		splice_enter(ops, socket, state, &t);
		report(ops, state, FLOW_OPENED);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		if (state->socket_class == CLASS_AGENT)
			accept_captured(ops, state);
		else
			accept_grant(ops, socket, state);
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		if (state->flags & SOCKET_SPLICED)
			splice_forget(socket);
		/* A socket that connected before and listens now must not admit what it is sent. */
		state->flags = 0;
		break;
	case BPF_SOCK_OPS_STATE_CB:
		note_fin(state, CONTEXT_READ(ops, args[0]), CONTEXT_READ(ops, args[1]));
		if (CONTEXT_READ(ops, args[1]) == BPF_TCP_CLOSE)
			on_close(ops, socket, state);
		break;
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		splice_note_tcp(ops, socket);
		break;
	}
	return 1;
}
