//! A resolver on loopback that behaves as told, over UDP and TCP on one port.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use hickory_proto::{
    op::{Message, MessageType, ResponseCode},
    rr::{RData, Record},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinSet,
};

/// How the resolver behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Behaviour {
    /// Answers every question with [`ADDRESS`].
    Answers,
    /// Says with this code that it has no answer.
    Fails(ResponseCode),
    /// Never answers.
    Silent,
    /// Answers with a wrong id, then a wrong question, then an unasked-for query, then as it should.
    LiesFirst,
    /// Over UDP, says that the answer does not fit.
    Truncates,
}

/// What names resolve to.
pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// A running resolver; ends when dropped.
#[derive(Debug)]
pub(crate) struct Resolver {
    pub(crate) address: SocketAddr,
    queries: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl Resolver {
    pub(crate) async fn start(behaviour: Behaviour) -> Self {
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            // The same port may be taken for TCP.
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
                break (udp, tcp);
            }
        };
        let address = udp.local_addr().unwrap();
        let queries = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        tasks.spawn(answer_udp(udp, behaviour, Arc::clone(&queries)));
        tasks.spawn(answer_tcp(tcp, behaviour));
        Self {
            address,
            queries,
            _tasks: tasks,
        }
    }

    /// How many queries came over UDP.
    pub(crate) fn queries(&self) -> usize {
        self.queries.load(Ordering::Relaxed)
    }
}

async fn answer_udp(socket: UdpSocket, behaviour: Behaviour, queries: Arc<AtomicUsize>) {
    let mut buffer = [0; 4096];
    loop {
        let (length, client) = socket.recv_from(&mut buffer).await.unwrap();
        queries.fetch_add(1, Ordering::Relaxed);
        let request = Message::from_vec(&buffer[..length]).unwrap();
        for answer in answers(&request, behaviour) {
            // The client may have given up, and its closed port be reported here.
            let _ = socket.send_to(&answer.to_vec().unwrap(), client).await;
        }
    }
}

fn answers(request: &Message, behaviour: Behaviour) -> Vec<Message> {
    let good = answer(request);
    match behaviour {
        Behaviour::Answers => vec![good],
        Behaviour::Silent => Vec::new(),
        Behaviour::Fails(code) => {
            let mut failure = good;
            failure.answers.clear();
            failure.metadata.response_code = code;
            vec![failure]
        }
        Behaviour::Truncates => vec![good.truncate()],
        Behaviour::LiesFirst => {
            let lie = |change: &dyn Fn(&mut Message)| {
                let mut lie = good.clone();
                lie.answers[0].data = RData::A(Ipv4Addr::new(203, 0, 113, 66).into());
                change(&mut lie);
                lie
            };
            vec![
                lie(&|message| message.metadata.id ^= 1),
                lie(&|message| {
                    message.queries[0].set_name("evil.example.".parse().unwrap());
                }),
                lie(&|message| message.metadata.message_type = MessageType::Query),
                lie(&|message| message.queries.clear()),
                good,
            ]
        }
    }
}

fn answer(request: &Message) -> Message {
    let mut answer = request.clone().into_response();
    let name = request.queries[0].name.clone();
    answer.metadata.recursion_available = true;
    answer.add_answer(Record::from_rdata(name, 60, RData::A(ADDRESS.into())));
    answer
}

async fn answer_tcp(listener: TcpListener, behaviour: Behaviour) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        if behaviour == Behaviour::Silent {
            continue;
        }
        answer_connection(stream).await;
    }
}

async fn answer_connection(mut stream: TcpStream) {
    let length = stream.read_u16().await.unwrap();
    let mut query = vec![0; length.into()];
    stream.read_exact(&mut query).await.unwrap();
    let answer = answer(&Message::from_vec(&query).unwrap())
        .to_vec()
        .unwrap();
    stream
        .write_u16(answer.len().try_into().unwrap())
        .await
        .unwrap();
    stream.write_all(&answer).await.unwrap();
}
