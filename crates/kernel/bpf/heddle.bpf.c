/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * Heddle's kernel programs, one object, so that all share one set of maps:
 *   socket.h   class and workload of every socket
 *   connect.h  the decision, at connect() (decide.h) and for datagrams
 *   datagram.h whom a datagram socket has asked, and what went to and fro
 *   tcp.h      hand-over from client to server, flow records
 *   splice.h   bytes past the TCP stack, for workloads that ask for it
 *   ingress.h  enforcement where packets arrive
 *   steer.h    what goes to the agent's listener instead of a program's
 *   bind.h     the agent's ports
 *   spoof.h    source addresses on the veth
 *   carry.h    what an earlier version left in sockets
 */
#include "bind.h"
#include "connect.h"
#include "ingress.h"
#include "socket.h"
#include "splice.h"
#include "spoof.h"
#include "steer.h"
#include "tcp.h"

char license_text[] SEC("license") = "GPL";
