//! What the tunnel costs, without namespaces and eBPF: client, client's proxy, server's proxy and server over loopback,
//! each proxy on one thread of its own, beside plain TCP between the same client and server.
//!
//! `cargo run --release -p tunnel --example loopback [pingpong|bulk|connect|idle] [SECONDS]`
#![allow(clippy::unwrap_used)] // It measures or it ends.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use identity::{SpiffeId, Svid};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tunnel::{
    Accepted, ClientLimits, ClientTls, ConnectHeaders, ConnectRequest, Handler, Outcome, Peer,
    Pool, PoolKey, Refusal, Server, ServerLimits, ServerTls, Session, relay, tls,
};

const MESSAGE: usize = 1024;
const CHUNK: usize = 128 << 10;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().unwrap_or_else(|| "all".to_owned());
    let seconds = arguments.next().map_or(3, |text| text.parse().unwrap());
    let length = Duration::from_secs(seconds);
    let server = start_server();
    let tunnel = start_tunnel(server);
    let wanted = |name| what == name || what == "all";
    if wanted("pingpong") {
        ping_pong("plain TCP", server, length);
        ping_pong("tunnel", tunnel, length);
    }
    if wanted("bulk") {
        for connections in [1, 8] {
            bulk("plain TCP", server, connections, length);
            bulk("tunnel", tunnel, connections, length);
        }
    }
    if wanted("connect") {
        for threads in [1, 16] {
            connect("plain TCP", server, threads, length);
            connect("tunnel", tunnel, threads, length);
        }
    }
    if wanted("idle") {
        idle(tunnel);
    }
}

fn ping_pong(name: &str, address: SocketAddr, length: Duration) {
    let mut tcp = open(address, b'e');
    let mut message = [7; MESSAGE];
    let mut times = Vec::new();
    let (started, cpu) = (Instant::now(), Cpu::now());
    while started.elapsed() < length {
        let sent = Instant::now();
        tcp.write_all(&message).unwrap();
        tcp.read_exact(&mut message).unwrap();
        times.push(sent.elapsed());
    }
    let cpu = cpu.since();
    times.sort();
    let count = times.len();
    println!(
        "1 KiB round trip, {name}: p50 {:.1} us, p99 {:.1} us, {:.0}/s; proxies' CPU {:.1} us each",
        times[count / 2].as_secs_f64() * 1e6,
        times[count * 99 / 100].as_secs_f64() * 1e6,
        count as f64 / length.as_secs_f64(),
        cpu.as_secs_f64() * 1e6 / count as f64,
    );
}

fn bulk(name: &str, address: SocketAddr, connections: usize, length: Duration) {
    let total = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let (started, cpu) = (Instant::now(), Cpu::now());
    let threads: Vec<_> = (0..connections)
        .map(|_| {
            let (total, stop) = (total.clone(), stop.clone());
            thread::spawn(move || {
                let mut tcp = open(address, b's');
                let chunk = vec![1; CHUNK];
                while !stop.load(Relaxed) {
                    tcp.write_all(&chunk).unwrap();
                    total.fetch_add(CHUNK as u64, Relaxed);
                }
            })
        })
        .collect();
    thread::sleep(length);
    let (bytes, elapsed, cpu) = (total.load(Relaxed) as f64, started.elapsed(), cpu.since());
    stop.store(true, Relaxed);
    for thread in threads {
        thread.join().unwrap();
    }
    println!(
        "{connections} x bulk, {name}: {:.2} Gbit/s; proxies' CPU {:.2} s/GB",
        bytes * 8.0 / 1e9 / elapsed.as_secs_f64(),
        cpu.as_secs_f64() / (bytes / 1e9),
    );
}

fn connect(name: &str, address: SocketAddr, threads: usize, length: Duration) {
    let total = Arc::new(AtomicU64::new(0));
    let (started, cpu) = (Instant::now(), Cpu::now());
    let threads: Vec<_> = (0..threads)
        .map(|_| {
            let total = total.clone();
            thread::spawn(move || {
                while started.elapsed() < length {
                    let mut tcp = open(address, b'e');
                    tcp.read_exact(&mut [0]).unwrap();
                    // Without TIME_WAIT, or ports run out.
                    socket2::SockRef::from(&tcp)
                        .set_linger(Some(Duration::ZERO))
                        .unwrap();
                    total.fetch_add(1, Relaxed);
                }
            })
        })
        .collect();
    let count = threads.len();
    for thread in threads {
        thread.join().unwrap();
    }
    let connections = total.load(Relaxed) as f64;
    println!(
        "connect, one byte, close; {count} threads, {name}: {:.0}/s; proxies' CPU {:.0} us each",
        connections / started.elapsed().as_secs_f64(),
        cpu.since().as_secs_f64() * 1e6 / connections,
    );
}

fn idle(address: SocketAddr) {
    let resident = || {
        let statm = fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    };
    let open_all = |count: usize| -> Vec<StdStream> {
        (0..count)
            .map(|_| {
                let mut tcp = open(address, b'e');
                tcp.read_exact(&mut [0]).unwrap();
                tcp
            })
            .collect()
    };
    let first = open_all(100);
    let before = resident();
    let more = open_all(1000);
    println!(
        "1,000 idle connections: {:.1} KiB each, for both proxies and the server's threads",
        (resident() - before) as f64 / 1024.0 / 1000.0
    );
    drop((first, more));
}

fn open(address: SocketAddr, kind: u8) -> StdStream {
    let mut tcp = StdStream::connect(address).unwrap();
    tcp.set_nodelay(true).unwrap();
    tcp.write_all(&[kind]).unwrap();
    if kind == b'e' {
        tcp.write_all(&[0]).unwrap();
    }
    tcp
}

/// Echoes, or swallows, as the first byte says.
fn start_server() -> SocketAddr {
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for tcp in listener.incoming() {
            let serve = move || {
                let mut tcp = tcp.unwrap();
                let mut kind = [0];
                tcp.set_nodelay(true).unwrap();
                if tcp.read_exact(&mut kind).is_err() {
                    return;
                }
                let size = if kind == *b"e" { 4096 } else { CHUNK };
                let mut buffer = vec![0; size];
                while let Ok(count @ 1..) = tcp.read(&mut buffer) {
                    if kind == *b"e" && tcp.write_all(&buffer[..count]).is_err() {
                        break;
                    }
                }
            };
            thread::Builder::new()
                .stack_size(64 << 10)
                .spawn(serve)
                .unwrap();
        }
    });
    address
}

/// Two proxies; the address of the client's.
fn start_tunnel(upstream: SocketAddr) -> SocketAddr {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let roots = [params.self_signed(&key).unwrap().der().clone()];
    let issuer = Issuer::new(params, key);
    let (client, server) = (svid(&issuer, "client"), svid(&issuer, "server"));
    let server_tls = tls::server_config(&server, &roots, "td").unwrap();
    let expected: Arc<[_]> = Arc::new([server.id.clone()]);
    let client_tls = tls::client_config(&client, &roots, Arc::clone(&expected)).unwrap();

    let (sender, receiver) = mpsc::channel();
    let told = sender.clone();
    proxy("server-proxy", async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        told.send(listener.local_addr().unwrap()).unwrap();
        serve(listener, upstream, server_tls).await;
    });
    let address = receiver.recv().unwrap();
    let key = PoolKey {
        source: 1,
        address,
        expected,
    };
    proxy("client-proxy", async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        sender.send(listener.local_addr().unwrap()).unwrap();
        carry(listener, upstream, key, client_tls).await;
    });
    receiver.recv().unwrap()
}

fn proxy(name: &str, work: impl Future<Output = ()> + Send + 'static) {
    let run = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(work);
    };
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .unwrap();
}

async fn serve(listener: TcpListener, upstream: SocketAddr, tls: ServerTls) {
    let server = Server::new(Everyone(upstream), ServerLimits::default());
    while let Ok((tcp, _)) = listener.accept().await {
        let (server, tls) = (server.clone(), tls.clone());
        tokio::spawn(async move {
            if let Err(error) = server.serve(tcp, tls, CancellationToken::new()).await {
                eprintln!("server: {error}");
            }
        });
    }
}

async fn carry(listener: TcpListener, target: SocketAddr, key: PoolKey, tls: ClientTls) {
    let pool = Pool::new(ClientLimits::default());
    while let Ok((tcp, address)) = listener.accept().await {
        let (pool, key, tls) = (pool.clone(), key.clone(), tls.clone());
        tokio::spawn(async move {
            tcp.set_nodelay(true).unwrap();
            let headers = ConnectHeaders {
                forwarded_for: Some(address),
                ..ConnectHeaders::default()
            };
            let dial = || TcpStream::connect(key.address);
            let stream = pool
                .connect(&key, dial, &tls, &target.into(), &headers)
                .await;
            match stream {
                Ok(stream) => drop(relay(tcp, stream, CancellationToken::new()).await),
                Err(error) => eprintln!("client: {error}"),
            }
        });
    }
}

struct Everyone(SocketAddr);

struct Nobody;

impl Session for Nobody {
    fn finished(self, _: &Outcome) {}
}

impl Handler for Everyone {
    type Session = Nobody;

    async fn connect(&self, _: &ConnectRequest) -> Result<Accepted<Nobody>, Refusal> {
        Ok(Accepted {
            upstream: TcpStream::connect(self.0).await.unwrap(),
            session: Nobody,
            ended: CancellationToken::new(),
        })
    }

    fn refused(&self, _: &Peer, _: &str, _: &Refusal) {}
}

fn svid(issuer: &Issuer<'_, KeyPair>, name: &str) -> Svid {
    let id = SpiffeId::of_account("td", "bench", name).unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().unwrap())];
    let key = KeyPair::generate().unwrap();
    let certificate: CertificateDer<'static> = params.signed_by(&key, issuer).unwrap().into();
    let now = SystemTime::now();
    Svid {
        id,
        chain: vec![certificate],
        key: PrivatePkcs8KeyDer::from(key.serialize_der()),
        not_before: now,
        not_after: now + Duration::from_secs(3600),
        serial: String::new(),
    }
}

/// CPU time of the two proxies' threads.
struct Cpu(Duration);

impl Cpu {
    fn now() -> Self {
        let mut total = 0;
        for task in fs::read_dir("/proc/self/task").unwrap() {
            let path = task.unwrap().path();
            let Ok(name) = fs::read_to_string(path.join("comm")) else {
                continue;
            };
            if name.trim().ends_with("-proxy") {
                let times = fs::read_to_string(path.join("schedstat")).unwrap();
                let on_cpu = times.split(' ').next().unwrap();
                total += on_cpu.parse::<u64>().unwrap();
            }
        }
        Self(Duration::from_nanos(total))
    }

    fn since(&self) -> Duration {
        Self::now().0 - self.0
    }
}
