//! Passing all that arrives at one interface on to another (tc-mirred(8)).

use futures_util::TryStreamExt;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage};

use super::{Link, NetworkError, netlink};

/// ETH_P_ALL of linux/if_ether.h: frames of every protocol.
const ALL_PROTOCOLS: u16 = 3;

/// Netlink's messages about queues have signed numbers of interfaces.
fn signed(index: u32) -> Result<i32, NetworkError> {
    let invalid = |_| rtnetlink::Error::InvalidNla(format!("interface {index}"));
    i32::try_from(index).map_err(invalid).map_err(netlink("name an interface"))
}

/// Whether what arrives at an interface is somebody's business already.
pub(super) async fn is_taken(link: &Link, interface: u32) -> Result<bool, NetworkError> {
    let index = signed(interface)?;
    let qdiscs: Vec<TcMessage> = link
        .handle
        .qdisc()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(netlink("list queueing disciplines"))?;
    let ingress = |attribute: &TcAttribute| matches!(attribute, TcAttribute::Kind(kind) if kind == "ingress" || kind == "clsact");
    Ok(qdiscs.iter().any(|qdisc| qdisc.header.index == index && qdisc.attributes.iter().any(ingress)))
}

/// Has all that arrives at `from` leave by `to`, instead of going up to the IP stack.
pub(super) async fn all(link: &Link, from: u32, to: u32) -> Result<(), NetworkError> {
    let index = signed(from)?;
    let failed = || netlink(format!("redirect from interface {from} to interface {to}"));
    link.handle.qdisc().add(index).ingress().execute().await.map_err(failed())?;
    let filter = link.handle.traffic_filter(index).add();
    let filter = filter.parent(0xffff_0000).priority(1).protocol(ALL_PROTOCOLS.to_be());
    filter.redirect(to).map_err(failed())?.execute().await.map_err(failed())
}

/// Removes the queueing discipline, and with it all that [`all`] made.
pub(super) async fn end(link: &Link, interface: u32) -> Result<(), rtnetlink::Error> {
    let index = i32::try_from(interface).map_err(|_| rtnetlink::Error::RequestFailed)?;
    let mut removal = link.handle.qdisc().del(index);
    let header = &mut removal.message_mut().header;
    header.parent = TcHandle::INGRESS;
    header.handle = TcHandle { major: u16::MAX, minor: 0 };
    removal.execute().await
}
