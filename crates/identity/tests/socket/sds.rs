//! The SDS client that runs inside a workload's cgroup: acknowledges what it gets and prints it, a line per secret.

use std::{
    convert::Infallible,
    future::ready,
    io::{Error, ErrorKind},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::Command,
};

use envoy_types::pb::envoy::{
    config::core::v3::{DataSource, data_source::Specifier},
    extensions::transport_sockets::tls::v3::{Secret, secret},
    service::{
        discovery::v3::DiscoveryRequest,
        secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient,
    },
};
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, transport::Endpoint};
use tower::service_fn;
use x509_parser::prelude::{FromDer, Pem, X509Certificate};

/// `sds SOCKET NAME...`: `connected`, then NAME KIND WHAT, where WHAT is the serial number or how many roots; or the error.
pub(crate) fn connect() {
    let (stream, names) = open();
    println!("connected");
    report(stream, &names);
}

/// `leave SOCKET NAME...`: connects and ends; a child has the socket.
#[allow(clippy::zombie_processes)] // The child outlives this process: that is the point.
pub(crate) fn connect_and_leave() {
    let (stream, names) = open();
    Command::new("/proc/self/exe")
        .arg("inherited")
        .arg("-")
        .args(names)
        .stdin(OwnedFd::from(stream))
        .spawn()
        .unwrap();
}

/// `inherited - NAME...`: the socket is the standard input.
pub(crate) fn go_on() {
    println!("inherited");
    let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    report(socket.into(), &arguments()[1..]);
}

fn arguments() -> Vec<String> {
    std::env::args().skip(2).collect()
}

fn open() -> (UnixStream, Vec<String>) {
    let mut names = arguments();
    let socket = names.remove(0);
    (UnixStream::connect(socket).unwrap(), names)
}

fn report(socket: UnixStream, names: &[String]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let Err(status) = runtime.block_on(stream(socket, names));
    println!("{:?} {}", status.code(), status.message());
}

async fn stream(socket: UnixStream, names: &[String]) -> Result<Infallible, Status> {
    socket.set_nonblocking(true).unwrap();
    let socket = tokio::net::UnixStream::from_std(socket).unwrap();
    let mut socket = Some(TokioIo::new(socket));
    let connector =
        service_fn(move |_| ready(socket.take().ok_or(Error::from(ErrorKind::NotConnected))));
    let endpoint = Endpoint::from_static("http://agent");
    let channel = endpoint.connect_with_connector(connector).await;
    let channel = channel.map_err(|error| Status::unavailable(error.to_string()))?;
    let mut client = SecretDiscoveryServiceClient::new(channel);
    let (requests, outgoing) = mpsc::channel(1);
    let mut request = DiscoveryRequest {
        resource_names: names.to_vec(),
        ..DiscoveryRequest::default()
    };
    requests.send(request.clone()).await.unwrap();
    let call = client.stream_secrets(ReceiverStream::new(outgoing));
    let mut responses = call.await?.into_inner();
    while let Some(response) = responses.message().await? {
        for resource in &response.resources {
            println!(
                "{}",
                describe(&Secret::decode(resource.value.as_slice()).unwrap())
            );
        }
        request.version_info = response.version_info;
        request.response_nonce = response.nonce;
        requests.send(request.clone()).await.unwrap();
    }
    Err(Status::unknown("the stream has ended"))
}

fn describe(secret: &Secret) -> String {
    let name = &secret.name;
    match secret.r#type.as_ref().unwrap() {
        secret::Type::TlsCertificate(tls) => {
            let chain = blocks(tls.certificate_chain.as_ref());
            let (_, certificate) = X509Certificate::from_der(&chain[0].contents).unwrap();
            let key = blocks(tls.private_key.as_ref());
            assert_eq!(key[0].label, "PRIVATE KEY");
            format!("{name} certificate {}", certificate.serial)
        }
        secret::Type::ValidationContext(context) => {
            let roots = blocks(context.trusted_ca.as_ref());
            format!("{name} roots {}", roots.len())
        }
        _ => format!("{name} other"),
    }
}

fn blocks(source: Option<&DataSource>) -> Vec<Pem> {
    let Some(Specifier::InlineBytes(text)) = &source.unwrap().specifier else {
        panic!("not inline");
    };
    Pem::iter_from_buffer(text).map(Result::unwrap).collect()
}
