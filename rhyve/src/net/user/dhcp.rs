//! What a guest hears that asks for an address (RFC 2131): it is always the same.

use std::net::Ipv4Addr;

use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr};

use crate::config::{GATEWAY, GUEST};

/// Where servers and clients are.
pub(super) const SERVER_PORT: u16 = 67;
pub(super) const CLIENT_PORT: u16 = 68;

/// Seconds for which an address is lent.
const LEASE: u32 = 86_400;
/// The option that says how large packets are.
const OPT_MTU: u8 = 26;

/// The answer to a client's message, if it has one.
pub(super) fn answer(message: &[u8], mtu: u16) -> Option<Vec<u8>> {
    let packet = DhcpPacket::new_checked(message).ok()?;
    let request = DhcpRepr::parse(&packet).ok()?;
    let wanted = request.requested_ip.unwrap_or(request.client_ip);
    let for_us = request.server_identifier.is_none_or(|id| id == GATEWAY);
    let (message_type, address) = match request.message_type {
        DhcpMessageType::Discover => (DhcpMessageType::Offer, GUEST),
        DhcpMessageType::Request if !for_us => return None,
        DhcpMessageType::Request if wanted == GUEST => (DhcpMessageType::Ack, GUEST),
        DhcpMessageType::Request => (DhcpMessageType::Nak, Ipv4Addr::UNSPECIFIED),
        DhcpMessageType::Inform => (DhcpMessageType::Ack, Ipv4Addr::UNSPECIFIED),
        _ => return None,
    };
    let refused = message_type == DhcpMessageType::Nak;
    let lent = address == GUEST;
    let mtu = mtu.to_be_bytes();
    let options = [DhcpOption {
        kind: OPT_MTU,
        data: &mtu,
    }];
    let reply = DhcpRepr {
        message_type,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: request.client_ip,
        your_ip: address,
        server_ip: GATEWAY,
        router: None,
        subnet_mask: (!refused).then_some(Ipv4Addr::new(255, 255, 255, 0)),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(GATEWAY),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: lent.then_some(LEASE),
        renew_duration: None,
        rebind_duration: None,
        additional_options: if refused { &[] } else { &options },
    };
    let mut bytes = vec![0; reply.buffer_len()];
    reply
        .emit(&mut DhcpPacket::new_unchecked(&mut bytes))
        .ok()?;
    Some(bytes)
}
