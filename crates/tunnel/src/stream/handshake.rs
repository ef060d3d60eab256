//! Drives a rustls handshake over a socket, and takes the connection over when it is done.

use std::{future::poll_fn, io, sync::Arc};

use rustls::{
    Error,
    client::{ClientConnectionData, UnbufferedClientConnection},
    kernel::KernelConnection,
    pki_types::CertificateDer,
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus},
};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

use super::{
    Handshaken, TlsStream,
    buffer::Buffer,
    record::{Opener, Sealer},
    tls_error,
};

/// Either side of a handshake.
pub(super) trait Handshake: Send {
    type Data: Send + 'static;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data>;

    /// The peer's certificate and the protocol that was agreed on.
    fn peer(&self) -> (Option<CertificateDer<'static>>, bool);

    fn take_over(self) -> Result<(rustls::ExtractedSecrets, KernelConnection<Self::Data>), Error>;
}

macro_rules! handshake {
    ($connection:ty, $data:ty) => {
        impl Handshake for $connection {
            type Data = $data;

            fn process<'c, 'i>(
                &'c mut self,
                incoming: &'i mut [u8],
            ) -> UnbufferedStatus<'c, 'i, $data> {
                self.process_tls_records(incoming)
            }

            fn peer(&self) -> (Option<CertificateDer<'static>>, bool) {
                let certificate = self.peer_certificates().and_then(|chain| chain.first());
                let h2 = self.alpn_protocol() == Some(b"h2");
                (certificate.cloned().map(CertificateDer::into_owned), h2)
            }

            fn take_over(
                self,
            ) -> Result<(rustls::ExtractedSecrets, KernelConnection<$data>), Error> {
                self.dangerous_into_kernel_connection()
            }
        }
    };
}

handshake!(UnbufferedClientConnection, ClientConnectionData);
handshake!(UnbufferedServerConnection, ServerConnectionData);

/// What has to be done before rustls can go on.
enum Need {
    Nothing,
    Write,
    Read,
    Done,
}

pub(super) async fn run<H: Handshake>(mut tcp: TcpStream, mut tls: H) -> io::Result<Handshaken> {
    let mut inbox = Buffer::take();
    let mut outgoing = Vec::new();
    // Data may follow the peer's last flight so closely that rustls opens it.
    let mut early = Vec::new();
    loop {
        let status = tls.process(inbox.filled_mut());
        let discard = status.discard;
        let need = match status.state {
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                encode(&mut data, &mut outgoing).map_err(tls_error)?;
                Need::Nothing
            }
            Ok(ConnectionState::TransmitTlsData(transmit)) => {
                transmit.done();
                Need::Write
            }
            Ok(ConnectionState::BlockedHandshake) => Need::Read,
            Ok(ConnectionState::WriteTraffic(_)) => Need::Done,
            Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                while let Some(record) = traffic.next_record() {
                    early.extend_from_slice(record.map_err(tls_error)?.payload);
                }
                Need::Nothing
            }
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => {
                return Err(fail(&mut tcp, &mut tls, error, inbox, outgoing).await);
            }
        };
        inbox.consume(discard);
        match need {
            Need::Nothing => {}
            Need::Write => {
                tcp.write_all(&outgoing).await?;
                outgoing.clear();
            }
            Need::Read => {
                if inbox.filled().len() == super::buffer::SIZE {
                    return Err(tls_error(Error::PeerSentOversizedRecord));
                }
                if poll_fn(|cx| inbox.poll_fill(&mut tcp, cx)).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            Need::Done => break,
        }
    }
    let (certificate, h2) = tls.peer();
    let certificate = certificate.ok_or_else(|| tls_error(Error::NoCertificatesPresented))?;
    if !h2 {
        // A peer that names no protocol at all is not refused by rustls.
        return Err(tls_error(Error::NoApplicationProtocol));
    }
    let (secrets, keys) = tls.take_over().map_err(tls_error)?;
    let sealer = Sealer::new(secrets.tx.0, &secrets.tx.1).map_err(tls_error)?;
    let opener = Opener::new(secrets.rx.0, &secrets.rx.1).map_err(tls_error)?;
    let mut stream = TlsStream::new(tcp, Box::new(keys), sealer, opener);
    stream.resume(inbox, &early)?;
    let failure = Arc::clone(&stream.failure);
    Ok(Handshaken {
        stream,
        failure,
        certificate,
    })
}

/// Sends the alert that rustls has for the peer; the error to report.
async fn fail<H: Handshake>(
    tcp: &mut TcpStream,
    tls: &mut H,
    error: Error,
    mut inbox: Buffer,
    mut outgoing: Vec<u8>,
) -> io::Error {
    // rustls may still point to messages in what was received, which therefore stays where it is.
    while let Ok(ConnectionState::EncodeTlsData(mut data)) = tls.process(inbox.filled_mut()).state {
        if encode(&mut data, &mut outgoing).is_err() {
            break;
        }
    }
    // The peer may be gone, and the first error is the one that counts.
    if tcp.write_all(&outgoing).await.is_ok() {
        let _ = tcp.shutdown().await;
    }
    tls_error(error)
}

fn encode<D>(data: &mut EncodeTlsData<'_, D>, outgoing: &mut Vec<u8>) -> Result<(), Error> {
    let start = outgoing.len();
    let mut room = 4096;
    loop {
        outgoing.resize(start + room, 0);
        match data.encode(&mut outgoing[start..]) {
            Ok(count) => {
                outgoing.truncate(start + count);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(needed)) if needed.required_size > room => {
                room = needed.required_size;
            }
            Err(error) => return Err(Error::General(error.to_string())),
        }
    }
}
