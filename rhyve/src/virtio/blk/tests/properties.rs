//! Random requests, and what is none: the disk is as an array is, and memory is left alone.

use super::*;

/// How a request's bytes are spread over descriptors.
#[derive(Clone, Debug)]
struct Layout {
    cuts: Vec<prop::sample::Index>,
    indirect: bool,
}

fn layout() -> impl Strategy<Value = Layout> {
    let cuts = prop::collection::vec(any::<prop::sample::Index>(), 0..6);
    (cuts, any::<bool>()).prop_map(|(cuts, indirect)| Layout { cuts, indirect })
}

impl Layout {
    /// Lengths of the pieces of `len` bytes.
    fn pieces(&self, len: usize) -> Vec<usize> {
        if len == 0 {
            return Vec::new();
        }
        let mut ends: Vec<usize> = self.cuts.iter().map(|cut| cut.index(len)).collect();
        ends.push(len);
        ends.sort_unstable();
        let mut start = 0;
        let pieces = ends.into_iter().map(|end| {
            let piece = end - start;
            start = end;
            piece
        });
        pieces.filter(|piece| *piece > 0).collect()
    }

    fn send(&self, driver: &mut GuestDriver, out: &[u8], room: usize) -> Sent {
        let mut rest = out;
        let mut buffers: Vec<Buffer> = Vec::new();
        for piece in self.pieces(out.len()) {
            let (now, later) = rest.split_at(piece);
            buffers.push(Buffer::Readable(now.to_vec()));
            rest = later;
        }
        let room = self.pieces(room).into_iter();
        buffers.extend(room.map(|piece| Buffer::Writable(piece as u32)));
        if self.indirect {
            driver.send_indirect(&buffers)
        } else {
            driver.send(&buffers)
        }
    }
}

#[derive(Clone, Debug)]
enum Ask {
    Read {
        sector: u64,
        count: usize,
    },
    Write {
        sector: u64,
        count: usize,
        byte: u8,
    },
    Zero {
        sector: u64,
        count: u32,
        unmap: bool,
    },
    Flush,
}

fn ask() -> impl Strategy<Value = Ask> {
    // Some of them reach across the end.
    let sector = 0..SECTORS + 4;
    let byte = any::<u8>();
    prop_oneof![
        3 => (sector.clone(), 0usize..40).prop_map(|(sector, count)| Ask::Read { sector, count }),
        3 => (sector.clone(), 0usize..40, byte)
            .prop_map(|(sector, count, byte)| Ask::Write { sector, count, byte }),
        1 => (sector, 0u32..40, any::<bool>())
            .prop_map(|(sector, count, unmap)| Ask::Zero { sector, count, unmap }),
        1 => Just(Ask::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn requests_do_to_the_disk_what_they_do_to_an_array(
        asks in prop::collection::vec((ask(), layout()), 1..30),
        options in prop::sample::select(vec![",aio=threads", "", ",nocache", ",snapshot", ",sync"]),
    ) {
        let snapshot = options == ",snapshot";
        let mut rig = Rig::new(options);
        let mut model = vec![0u8; SIZE];
        for (ask, layout) in asks {
            let range = |sector: u64, count: usize| {
                let start = sector as usize * 512;
                (start + count * 512 <= SIZE).then_some(start..start + count * 512)
            };
            let (out, room, range) = match ask {
                Ask::Read { sector, count } => {
                    (header(IN, sector), count * 512, range(sector, count))
                }
                Ask::Write { sector, count, byte } => {
                    let data: Vec<u8> = (0..count * 512).map(|i| byte ^ (i / 97) as u8).collect();
                    let range = range(sector, count);
                    if let Some(range) = range.clone() {
                        model[range].copy_from_slice(&data);
                    }
                    ([header(OUT, sector), data].concat(), 0, range)
                }
                Ask::Zero { sector, count, unmap } => {
                    let range = range(sector, count as usize);
                    if let Some(range) = range.clone() {
                        model[range].fill(0);
                    }
                    let segment = segment(sector, count, unmap.into());
                    ([header(WRITE_ZEROES, 0), segment].concat(), 0, range)
                }
                Ask::Flush => (header(FLUSH, 0), 0, Some(0..0)),
            };
            let sent = layout.send(&mut rig.driver, &out, room + 1);
            let (read, status) = rig.settle(&sent);
            match range {
                Some(range) => {
                    prop_assert_eq!(status, OK);
                    if room > 0 {
                        prop_assert!(read == model[range]);
                    }
                }
                None => prop_assert_eq!(status, IOERR),
            }
        }
        let (all, status) = rig.ask(IN, 0, &[], SIZE as u32);
        prop_assert_eq!(status, OK);
        prop_assert!(all == model);
        rig.device.reset();
        let expected = if snapshot { vec![0; SIZE] } else { model };
        prop_assert!(rig.content() == expected);
    }

    #[test]
    fn nonsense_is_answered_and_touches_only_its_own_room(
        mut out in prop::collection::vec(any::<u8>(), 0..600),
        kind in prop_oneof![Just(None), prop::sample::select(vec![0u32, 1, 4, 8, 11, 13]).prop_map(Some)],
        low_sector: bool,
        room in 0usize..600,
        layout in layout(),
        legacy: bool,
    ) {
        for (at, byte) in kind.unwrap_or_default().to_le_bytes().into_iter().enumerate() {
            if let (Some(_), Some(place)) = (kind, out.get_mut(at)) {
                *place = byte;
            }
        }
        if low_sector {
            out.iter_mut().skip(9).take(7).for_each(|byte| *byte = 0);
        }
        prop_assume!(out.len() + room > 0);
        let mut rig = Rig::with_features("", if legacy { 0 } else { u64::MAX });
        let sent = layout.send(&mut rig.driver, &out, room);
        let memory = rig.driver.memory().clone();
        let everything = || {
            let mut bytes = vec![0; 4 << 20];
            memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            bytes
        };
        let mut before = everything();
        rig.driver.kick();
        let (_, written) = rig.driver.wait_used();
        rig.device.reset();
        let after = everything();
        if room == 0 {
            prop_assert_eq!(written, 0);
        } else {
            prop_assert!(*rig.driver.received(&sent).last().unwrap() <= 2);
        }
        let rings = rig.driver.rings();
        let used = (rings.used, 6 + 8 * u32::from(rings.size));
        for (address, len) in sent.writable.iter().copied().chain([used]) {
            let range = address as usize..address as usize + len as usize;
            before[range.clone()].copy_from_slice(&after[range]);
        }
        prop_assert!(before == after);
        prop_assert_eq!(rig.content().len(), SIZE);
        prop_assert!(!rig.interrupts.needs_reset_is_set());
    }

    #[test]
    fn random_descriptors_break_the_queue_at_most(
        descriptors in prop::collection::vec(any::<(u32, u16, u16, u16)>(), 1..16),
        head in 0u16..20,
    ) {
        let mut rig = Rig::new("");
        for (i, (address, len, flags, next)) in (0..).zip(descriptors) {
            // About half of them in RAM.
            let address = u64::from(address % (8 << 20));
            let descriptor = RawDescriptor {
                address,
                len: len.into(),
                flags: flags & 7,
                next: next % 20,
            };
            rig.driver.set_descriptor(i, descriptor);
        }
        rig.driver.make_available(head);
        rig.driver.kick();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            let index: u16 = rig.driver.memory()
                .read_obj(GuestAddress(rig.driver.rings().used + 2))
                .unwrap();
            if index != 0 || rig.interrupts.needs_reset_is_set() {
                break;
            }
            prop_assert!(std::time::Instant::now() < end, "neither answered nor broken");
            std::thread::yield_now();
        }
        rig.device.reset();
        prop_assert_eq!(rig.content().len(), SIZE);
    }
}
