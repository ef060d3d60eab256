/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * The structs that the kernel programs and user space share. Their Rust twins are in src/types.rs;
 * a test compares sizes and offsets of both through the object's BTF.
 *
 * Addresses are always 16 bytes in network order: IPv4 as ::ffff:a.b.c.d. Ports are in host order.
 */
#pragma once

#include <linux/types.h>

struct address {
	__u32 word[4];
};

/* Who made a socket, decided by the cgroup that it was created in. */
enum socket_class {
	CLASS_NONE = 0,
	CLASS_APP = 1,
	CLASS_L7 = 2,
	CLASS_AGENT = 3,
};

enum action {
	ACTION_DENY = 0,
	ACTION_DIRECT = 1,
	ACTION_L7 = 2,
	ACTION_AGENT = 3,
};

/* Where captured connections go: the key of the capture map. */
enum capture_kind {
	CAPTURE_DNS = 1,
	CAPTURE_AGENT = 2,
	CAPTURE_L7 = 3,
};

/* Why a connection was allowed or refused. Counted one by one; named in src/reason.rs. */
enum reason {
	REASON_NONE = 0,
	REASON_POLICY_ALLOW = 1,
	REASON_NO_POLICY = 2,
	REASON_POLICY_DENY = 3,
	REASON_NO_ALLOW_MATCHED = 4,
	REASON_PEER_NOT_ATTESTED = 5,
	REASON_NO_VERDICT = 6,
	REASON_NO_ENDPOINT = 7,
	REASON_NO_SUCH_PORT = 8,
	REASON_NO_SUCH_ADDRESS = 9,
	REASON_NO_EGRESS = 10,
	REASON_NO_TUNNEL = 11,
	REASON_NO_IDENTITY = 12,
	REASON_NO_CAPTURE_TARGET = 13,
	REASON_UDP_NOT_CARRIED = 14,
	REASON_PROTOCOL_NOT_CARRIED = 15,
	REASON_STATE_FULL = 16,
	REASON_HANDSHAKES_FULL = 17,
	REASON_SPOOFED = 18,
	REASON_DEVICE_UNKNOWN = 19,
	REASON_EVENT_LOST = 20,
	REASON_NEEDS_AGENT = 21,
	REASON_PEERS_FULL = 22,
	REASON_NOT_SPLICED = 23,
	REASON_DELIVERED = 24,
	REASON_RESERVED_PORT = 25,
	REASON_COUNT = 26,
};

enum flow_kind {
	FLOW_CLOSED = 1,          /* a connection ended; bytes and round-trip time are final */
	FLOW_REFUSED_CONNECT = 2, /* refused in the client's connect() */
	FLOW_REFUSED_INGRESS = 3, /* refused where it arrived */
	FLOW_OPENED = 4,          /* a connection was established, or a first datagram let in */
};

/* The identity id of peers that nobody vouches for. */
#define SOURCE_ANONYMOUS 0

/* TCP ports of every workload that the agent listens on: captured connections, what is steered, HBONE. */
#define PORT_OUTBOUND 15001
#define PORT_INBOUND 15006
#define PORT_HBONE 15008

/* cgroups: cgroup id -> who lives there. */
struct cgroup_entry {
	__u32 workload;
	__u32 socket_class;
};

/* workloads: local workloads only. One write switches a workload to new rules. */
struct workload_entry {
	__u64 netns;
	/* By address family (FAMILY_V4, FAMILY_V6): policies may look at addresses. */
	__u32 source[2];     /* identity id: the source half of a verdict's key */
	__u32 policy_set[2]; /* the destination half */
	struct address v4;
	struct address v6;
	__u32 flags; /* WORKLOAD_SPLICE */
	__u32 padding;
};
#define WORKLOAD_SPLICE 1 /* connections with others that have it may skip the TCP stack */
#define FAMILY_V4 0
#define FAMILY_V6 1

/* addresses: every workload address of the mesh. */
#define ADDRESS_LOCAL 1
struct address_entry {
	__u32 workload;
	__u32 flags;
	__u32 policy_set; /* of another node's workload, if its refusals are known here; 0: unknown */
};

struct service_key {
	struct address address;
	__u16 port; /* 0: the address is a service's, whatever the port */
	__u8 protocol;
	__u8 padding;
};

struct service_entry {
	__u32 service;
	__u32 generation;
	__u32 slots;
	__u32 affinity_seconds;
};

/* One column of an alias table (Vose): the endpoint if a random u32 is below threshold, else the alias. */
struct slot_key {
	__u32 service;
	__u32 generation;
	__u32 slot;
};

struct slot_entry {
	__u32 endpoint;
	__u32 alias;
	__u32 threshold;
};

struct endpoint_entry {
	struct address address;
	__u32 service;
	__u16 port;
	__u16 padding;
};

struct verdict_key {
	__u32 source;
	__u32 policy_set;
	__u16 port; /* 0: every port without an entry of its own */
	__u8 socket_class;
	__u8 padding;
};

struct verdict_entry {
	__u32 policy;
	__u16 reason;
	__u8 action;
	__u8 padding;
};

struct affinity_key {
	__u32 workload;
	__u32 service;
};

struct affinity_entry {
	__u64 last_ns;
	__u32 endpoint;
	__u32 padding;
};

struct capture_key {
	__u32 workload;
	__u32 kind;
};

/* devices: node side of a workload's veth -> the only source addresses it may send from. */
struct device_entry {
	struct address v4;
	struct address v6;
	__u8 mac[6];
	__u16 padding;
};

/* What the client's connect hook decided: travels from there to the server's socket. */
struct grant {
#ifdef HEDDLE_TEST_LAYOUT /* tests of upgrades compile a version whose structs differ */
	__u32 test_layout[2];
#endif
	__u64 start_ns;
	struct address original; /* where the program asked to go */
	__u32 source_workload;
	__u32 source;
	__u32 destination_workload;
	__u32 policy;
	__u32 service;
	__u16 original_port;
	__u16 reason;
	struct address target; /* a captured connection's: the endpoint that was chosen */
	__u16 target_port;
	__u16 padding[3];
};

/* handshakes: connections between SYN and accept, so that the server's side knows its peer. */
struct tuple {
	struct address source;
	struct address destination;
	__u16 source_port;
	__u16 destination_port;
};

#ifdef HEDDLE_TEST_LAYOUT
struct test_counter {
	__u64 count;
};
#endif

/* State of one socket, kept in the socket itself. */
#define SOCKET_ADMITTED 1  /* its packets need no further check */
#define SOCKET_LOCAL 2     /* within one workload: no flow record */
#define SOCKET_CLIENT 4    /* it connected */
#define SOCKET_ESTABLISHED 8
#define SOCKET_REDIRECTED 16 /* the peer's address shown to the program is grant.original */
#define SOCKET_FIN_ACKED 32  /* TCP counts a SYN and a FIN as one byte each: these are not payload */
#define SOCKET_FIN_RECEIVED 64
#define SOCKET_REPLIES 128   /* a datagram server's, connected to a client that may call it */
#define SOCKET_SPLICED 256   /* has a state in `splices`, and is or was in `splice_sockets` */
#define SOCKET_CAPTURED 512  /* a program's, led to the agent */
#define SOCKET_DELIVERS 1024 /* the agent's, to a program of this node, under a client's address */
/* Of those that stay within one workload, these tell the other side of them what was decided. */
#define SOCKET_PUBLISHES (SOCKET_CAPTURED | SOCKET_DELIVERS)
/* The mark of a connected datagram socket: the number of the service that it asked, or that it SOCKET_REPLIES. */
#define MARK_REPLIES 0x80000000
/* The mark of the agent's sockets that SOCKET_DELIVERS: beside it the number of the workload, which has fewer bits. A route
 * to the workload itself goes by it, in the way back as well. No datagram socket's mark has both bits: services are
 * numbered from 1 upwards. */
#define DELIVERY_MARK 0xc0000000
#define DELIVERY_MASK 0xc0000000
_Static_assert((MARK_REPLIES & DELIVERY_MASK) != DELIVERY_MARK, "a datagram would take a delivery's route");
struct socket_state {
#ifdef HEDDLE_TEST_LAYOUT
	__u32 test_layout[3];
	__u32 workload;
	__u64 netns;
#else
	__u64 netns;
	__u32 workload;
#endif
	__u32 socket_class;
	__u32 flags;
	__u32 refused_at; /* when a refused datagram was last recorded, in units of 2^20 ns */
	struct grant grant;
};

/*
 * peers: whom an unconnected datagram socket has asked lately, kept in the socket: what comes back is let in, and shown
 * under the address that the program asked for. A table of sets: a peer's place is one of PEER_WAYS.
 */
#define PEER_SETS 32
#define PEER_WAYS 8
struct peer {
	struct address address;
	struct address original;
	__u64 last_ns; /* 0: never used */
	__u16 port;
	__u16 original_port;
	__u32 padding;
};
struct peers {
	struct peer peer[PEER_SETS * PEER_WAYS];
};

/* datagrams: what went between a client's and a server's datagram socket. Only told, never decided by. */
struct datagram_flow {
	__u64 start_ns;
	__u64 last_ns;
	__u64 bytes_sent;     /* by the client */
	__u64 bytes_received; /* by the client */
	struct address original;
	__u32 source_workload;
	__u32 source;
	__u32 destination_workload;
	__u32 policy;
	__u32 service;
	__u32 packets_sent;
	__u32 packets_received;
	__u16 original_port;
	__u16 reason;
};

/*
 * splice.h. A connection: its client's tuple and the next sequence number of either side when it was established.
 */
struct splice_connection {
	struct tuple tuple;
	__u32 client_sequence;
	__u32 server_sequence;
};
#define SPLICE_CLIENT 0
#define SPLICE_SERVER 1

/* splice_sockets: one end of a spliced connection. */
struct splice_key {
	struct splice_connection connection;
	__u32 side;
};

/* splice_pairs: what both ends of a spliced connection must know. Indexed by who sends. */
struct splice_pair {
	__u64 sent[2]; /* bytes that were spliced */
	__u64 read[2]; /* how many of them count as read */
	__u32 ended;   /* the server's side has ended */
	__u32 padding;
};

/* splices: one end's own state, kept in the socket. */
struct splice_state {
	struct splice_connection connection;
	__u32 side;
	__u64 sent;     /* bytes that this end spliced */
	__u32 over_tcp; /* this end's bytes go over TCP, for good */
	__u32 padding;
};

#define FLOW_SPLICED 2 /* in flow_event.flags beside SOCKET_*: flows within a workload (SOCKET_LOCAL) are not told */
struct flow_event {
	__u64 time_ns;
	__u64 duration_ns;
	__u64 cookie;
	__u64 bytes_sent;     /* by the client */
	__u64 bytes_received; /* by the client */
	struct address source;
	struct address destination;
	struct address original;
	__u32 source_workload;
	__u32 source_identity;
	__u32 destination_workload;
	__u32 policy;
	__u32 service;
	__u32 srtt_us;
	__u32 retransmits;
	__u16 source_port;
	__u16 destination_port;
	__u16 original_port;
	__u16 reason;
	__u8 kind;
	__u8 protocol;
	__u8 socket_class;
	__u8 flags;
};
