/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * The splice: bytes between two workloads that both asked for it go from one socket's send to the other socket's
 * receive queue, past the TCP stack. Off unless asked for: docs/splice.md tells what it changes for a program.
 *
 * Whatever is missing or goes wrong here ends in TCP, never in an error and never in lost or reordered bytes:
 *  - A connection is known by its ports *and* the sequence numbers it began with. A later connection between the
 *    same ports is another one, so nobody is evicted and nobody is given a stranger's bytes.
 *  - A direction starts spliced and may change to TCP, once and for good: a reader empties the splice's queue before
 *    it looks at what TCP brought. The way back would reorder, so there is none.
 *  - Spliced bytes wait unbounded by any window, so they are bounded here: see SPLICE_WINDOW.
 *  - Only sockets that policy has admitted get in.
 */
#pragma once

#include "address.h"
#include "maps.h"

/* Bytes that may wait unread in one direction. Beyond it TCP carries them, and blocks the writer as always. */
#define SPLICE_WINDOW (128 * 1024)
/* How many bytes each byte that the peer sends counts as read. Nothing tells us that a program has read; that it
 * answers is a good sign. A peer that talks and never reads can make no more than this wait per byte it sends. */
#define SPLICE_READ_PER_BYTE 64

static __always_inline int wants_splice(__u32 workload)
{
	struct workload_entry *entry = bpf_map_lookup_elem(&workloads, &workload);

	return entry && (entry->flags & WORKLOAD_SPLICE);
}

/* Called when a connection is established, on either side. */
static __always_inline void splice_enter(struct bpf_sock_ops *ops, struct bpf_sock *socket,
					 struct socket_state *state, const struct tuple *t)
{
	int is_client = state->flags & SOCKET_CLIENT;
	__u32 peer = is_client ? state->grant.destination_workload : state->grant.source_workload;
	struct splice_state *splice;
	struct splice_pair fresh = {};
	struct splice_key key = {};
	__u32 callbacks;

	if ((state->flags & SOCKET_LOCAL) || state->socket_class != CLASS_APP)
		return;
	/* Semantics change at both ends, so both must have asked. */
	if (!wants_splice(state->workload) || !wants_splice(peer))
		return;
	key.connection.tuple = *t;
	key.side = is_client ? SPLICE_CLIENT : SPLICE_SERVER;
	key.connection.client_sequence =
		is_client ? CONTEXT_READ(ops, snd_nxt) : CONTEXT_READ(ops, rcv_nxt);
	key.connection.server_sequence =
		is_client ? CONTEXT_READ(ops, rcv_nxt) : CONTEXT_READ(ops, snd_nxt);
	splice = bpf_sk_storage_get(&splices, socket, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!splice) {
		count(REASON_NOT_SPLICED);
		return;
	}
	splice->connection = key.connection;
	splice->side = key.side;
	splice->over_tcp = 0;
	splice->sent = 0;
	/* The pair is the client's: it makes it, and takes it away when it closes. */
	if (is_client && bpf_map_update_elem(&splice_pairs, &key.connection, &fresh, BPF_NOEXIST)) {
		count(REASON_NOT_SPLICED);
		return;
	}
	if (bpf_sock_hash_update(ops, &splice_sockets, &key, BPF_NOEXIST)) {
		if (is_client)
			bpf_map_delete_elem(&splice_pairs, &key.connection);
		count(REASON_NOT_SPLICED);
		return;
	}
	state->flags |= SOCKET_SPLICED;
	callbacks = CONTEXT_READ(ops, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
	if (is_client)
		callbacks |= BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;
	bpf_sock_ops_cb_flags_set(ops, callbacks);
}

/*
 * TCP is about to queue bytes of a client's socket. Usually the splice sent them here. But a send() that began before
 * the connection stood (fast open, or a second thread) does not pass the splice: what follows it must not overtake it.
 */
static __always_inline void splice_note_tcp(struct bpf_sock_ops *ops, struct bpf_sock *socket)
{
	struct splice_state *splice;

	/* Only then is this call made before bytes are queued; otherwise a segment is being built, perhaps a mere
	 * acknowledgement. */
	if (CONTEXT_READ(ops, args[0]) != BPF_WRITE_HDR_TCP_CURRENT_MSS)
		return;
	splice = bpf_sk_storage_get(&splices, socket, 0, 0);
	if (splice)
		splice->over_tcp = 1;
	bpf_sock_ops_cb_flags_set(ops, CONTEXT_READ(ops, bpf_sock_ops_cb_flags) &
					       ~BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
}

/* Adds what was spliced to a client's flow record: TCP has not seen these bytes. */
static __always_inline void splice_report(struct bpf_sock *socket, struct flow_event *event)
{
	struct splice_state *splice = bpf_sk_storage_get(&splices, socket, 0, 0);
	struct splice_pair *pair;

	if (!splice)
		return;
	pair = bpf_map_lookup_elem(&splice_pairs, &splice->connection);
	if (!pair)
		return;
	event->bytes_sent += pair->sent[SPLICE_CLIENT];
	event->bytes_received += pair->sent[SPLICE_SERVER];
	if (event->kind == FLOW_OPENED || pair->sent[SPLICE_CLIENT] || pair->sent[SPLICE_SERVER])
		event->flags |= FLOW_SPLICED;
}

/* A connection has ended for TCP. What waits can still be read, but nothing is added to it. */
static __always_inline void splice_end(struct bpf_sock *socket)
{
	struct splice_state *splice = bpf_sk_storage_get(&splices, socket, 0, 0);
	struct splice_pair *pair;

	if (!splice)
		return;
	splice->over_tcp = 1;
	if (splice->side == SPLICE_CLIENT) {
		bpf_map_delete_elem(&splice_pairs, &splice->connection);
		return;
	}
	pair = bpf_map_lookup_elem(&splice_pairs, &splice->connection);
	if (pair)
		pair->ended = 1;
}

/* A socket that was spliced is used again: what its last connection left unread goes, as it does in TCP. */
static __always_inline void splice_forget(struct bpf_sock *socket)
{
	struct splice_state *splice = bpf_sk_storage_get(&splices, socket, 0, 0);
	struct splice_key key = {};

	if (!splice)
		return;
	key.connection = splice->connection;
	key.side = splice->side;
	bpf_map_delete_elem(&splice_sockets, &key);
	bpf_sk_storage_delete(&splices, socket);
}

/* Runs for every send() on a spliced socket, and says where its bytes go. */
SEC("sk_msg")
int heddle_splice(struct sk_msg_md *msg)
{
	struct bpf_sock *socket = msg->sk;
	struct splice_state *splice;
	struct splice_pair *pair;
	struct splice_key to = {};
	__u32 size = msg->size, own, peer, tcp;
	__u64 unread;

	if (!socket)
		return SK_PASS;
	splice = bpf_sk_storage_get(&splices, socket, 0, 0);
	if (!splice)
		return SK_PASS;
	own = splice->side & 1;
	peer = own ^ 1;
	pair = bpf_map_lookup_elem(&splice_pairs, &splice->connection);
	if (!pair) {
		splice->over_tcp = 1;
		return SK_PASS;
	}
	/* Each counter has one writer, under its socket's lock. */
	unread = pair->sent[peer] - pair->read[peer];
	if (unread > (__u64)size * SPLICE_READ_PER_BYTE)
		unread = (__u64)size * SPLICE_READ_PER_BYTE;
	pair->read[peer] += unread;
	if (splice->over_tcp)
		return SK_PASS;
	/* After a shutdown or a reset the splice would still carry; TCP knows the right error. */
	tcp = socket->state;
	if ((tcp != BPF_TCP_ESTABLISHED && tcp != BPF_TCP_CLOSE_WAIT) || pair->ended ||
	    pair->sent[own] - pair->read[own] + size > SPLICE_WINDOW) {
		splice->over_tcp = 1;
		return SK_PASS;
	}
	to.connection = splice->connection;
	to.side = peer;
	if (bpf_msg_redirect_hash(msg, &splice_sockets, &to, BPF_F_INGRESS) != SK_PASS) {
		splice->over_tcp = 1;
		return SK_PASS;
	}
	pair->sent[own] += size;
	splice->sent += size;
	return SK_PASS;
}
