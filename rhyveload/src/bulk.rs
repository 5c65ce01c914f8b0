//! Brings the bulk of a load into guest memory, with several threads.
//!
//! To clear the huge pages that a kernel goes into takes as long as to fill them, and both can be done
//! by every processor there is. So the work is cut into pieces, at addresses where huge pages begin,
//! and each thread takes the next one. Where there are huge pages, bytes go straight from the file
//! into them; elsewhere, and from sources that are no plain file, by way of [`copy`].

use std::fs::File;
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::thread;

use vmm_api::memory::{GuestRam, HUGE_PAGE, MemoryError};

use crate::copy::{CopyError, copy};
use crate::plan::Segment;
use crate::progress::Progress;
use crate::source::Source;

/// Guest-physical addresses at which pieces end: some huge pages, so that collapsing them is one call.
const PIECE: u64 = 8 << 20;

/// More would wait for memory, not for processors.
const THREADS: usize = 4;

const WHAT: &str = "copying";

/// One file's part of a load.
#[derive(Debug)]
pub struct Job<'a> {
    /// The bytes.
    pub from: &'a dyn Source,
    /// Which of them go where.
    pub segments: &'a [Segment],
}

/// Guest memory that is going to be used densely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Guest-physical address.
    pub gpa: u64,
    /// Number of bytes.
    pub len: u64,
}

enum Task<'a> {
    Read {
        job: usize,
        file: &'a File,
        offset: u64,
    },
    Prepare,
}

struct Piece<'a> {
    gpa: u64,
    len: u64,
    /// Belongs to something that is worth huge pages, though its own end may fill none.
    huge: bool,
    task: Task<'a>,
}

/// Copies all jobs into memory where nothing was written before, and puts huge pages under `rooms`,
/// where there are any to be had.
///
/// # Errors
///
/// The number of the job that failed, and why.
pub fn bring(
    jobs: &[Job<'_>],
    rooms: &[Room],
    ram: &GuestRam,
    progress: &mut Progress,
) -> Result<(), (usize, CopyError)> {
    let pieces = pieces(jobs, rooms);
    let total = jobs.iter().flat_map(|job| job.segments);
    let total = total.map(|segment| segment.filesz).sum();
    let work = Work {
        ram,
        pieces: &pieces,
        next: AtomicUsize::new(0),
        done: AtomicU64::new(0),
        failed: AtomicBool::new(false),
        failure: Mutex::default(),
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    thread::scope(|scope| {
        for _ in 1..threads.min(THREADS).min(pieces.len()) {
            scope.spawn(|| work.run(&mut |_| {}));
        }
        work.run(&mut |done| progress.step(WHAT, done, total));
    });
    if let Some(failure) = work
        .failure
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
    {
        return Err(failure);
    }
    let mut done = work.done.into_inner();
    for (number, job) in jobs
        .iter()
        .enumerate()
        .filter(|(_, job)| job.from.file().is_none())
    {
        for segment in job.segments {
            if segment.filesz >= HUGE_PAGE {
                ram.prepare(segment.gpa, segment.filesz);
            }
            let read = |offset, bytes: &mut [u8]| job.from.read(offset, bytes);
            copy(
                read,
                (segment.offset, segment.filesz),
                ram,
                segment.gpa,
                |copied| {
                    done += copied;
                    progress.step(WHAT, done, total);
                },
            )
            .map_err(|error| (number, error))?;
        }
    }
    Ok(())
}

/// What is to be done: jobs first, as their bytes must be there before anything else matters.
fn pieces<'a>(jobs: &[Job<'a>], rooms: &[Room]) -> Vec<Piece<'a>> {
    let mut pieces = Vec::new();
    for (number, job) in jobs.iter().enumerate() {
        let Some(file) = job.from.file() else {
            continue;
        };
        for segment in job.segments {
            pieces.extend(cut(segment.gpa, segment.filesz).map(|(gpa, len)| Piece {
                gpa,
                len,
                huge: segment.filesz >= HUGE_PAGE,
                task: Task::Read {
                    job: number,
                    file,
                    offset: segment.offset + (gpa - segment.gpa),
                },
            }));
        }
    }
    for room in rooms {
        pieces.extend(cut(room.gpa, room.len).map(|(gpa, len)| Piece {
            gpa,
            len,
            huge: room.len >= HUGE_PAGE,
            task: Task::Prepare,
        }));
    }
    pieces
}

/// The parts of a range, as addresses and lengths, that lie between multiples of [`PIECE`].
fn cut(start: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = start.saturating_add(len);
    let mut at = start;
    std::iter::from_fn(move || {
        let from = at;
        at = (from / PIECE + 1).saturating_mul(PIECE).min(end);
        (from < at).then(|| (from, at - from))
    })
}

/// What the threads share.
struct Work<'a> {
    ram: &'a GuestRam,
    pieces: &'a [Piece<'a>],
    next: AtomicUsize,
    /// Bytes that have been copied.
    done: AtomicU64,
    failed: AtomicBool,
    failure: Mutex<Option<(usize, CopyError)>>,
}

impl Work<'_> {
    /// Does pieces until there are no more; `step` is told how many bytes all have copied.
    fn run(&self, step: &mut dyn FnMut(u64)) {
        while let Some(piece) = self.pieces.get(self.next.fetch_add(1, Relaxed)) {
            if self.failed.load(Relaxed) {
                return;
            }
            let huge = piece.huge && self.ram.prepare(piece.gpa, piece.len);
            let Task::Read { job, file, offset } = piece.task else {
                continue;
            };
            let copied = match huge {
                true => {
                    let read = self.ram.read_file(piece.gpa, piece.len, file, offset);
                    step(self.done.fetch_add(piece.len, Relaxed) + piece.len);
                    read.map_err(|error| match error {
                        MemoryError::Source(source) => CopyError::Read {
                            offset,
                            len: usize::try_from(piece.len).unwrap_or(usize::MAX),
                            source,
                        },
                        other => CopyError::Write(other),
                    })
                }
                false => copy(
                    |offset, bytes: &mut [u8]| file.read_exact_at(bytes, offset),
                    (offset, piece.len),
                    self.ram,
                    piece.gpa,
                    |copied| step(self.done.fetch_add(copied, Relaxed) + copied),
                ),
            };
            if let Err(error) = copied {
                self.failed.store(true, Relaxed);
                let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
                failure.get_or_insert((job, error));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vmm_api::memory::{MemFile, MemoryLayout};

    use super::*;
    use crate::source::FileSource;

    const MIB: u64 = 1 << 20;

    #[test]
    fn pieces_end_where_huge_pages_begin() {
        let parts = |start, len| cut(start, len).collect::<Vec<_>>();
        assert_eq!(parts(16 * MIB, 0), []);
        assert_eq!(parts(16 * MIB, 8 * MIB), [(16 * MIB, 8 * MIB)]);
        assert_eq!(
            parts(15 * MIB, 10 * MIB),
            [(15 * MIB, MIB), (16 * MIB, 8 * MIB), (24 * MIB, MIB)]
        );
        assert_eq!(parts(u64::MAX - 1, 9), [(u64::MAX - 1, 1)]);
    }

    #[test]
    fn the_end_of_something_large_is_in_huge_pages_too() {
        let source = file(&[1; 9 * MIB as usize]);
        let segment = |gpa, filesz| Segment {
            offset: 0,
            filesz,
            memsz: filesz,
            gpa,
        };
        let segments = [segment(16 * MIB, 9 * MIB), segment(32 * MIB, MIB)];
        let jobs = [Job {
            from: &source,
            segments: &segments,
        }];
        let room = Room {
            gpa: 48 * MIB,
            len: MIB,
        };
        let pieces = pieces(&jobs, &[room]);
        let found: Vec<_> = pieces.iter().map(|p| (p.gpa / MIB, p.huge)).collect();
        assert_eq!(found, [(16, true), (24, true), (32, false), (48, false)]);
    }

    fn memory() -> (GuestRam, MemFile) {
        let layout = MemoryLayout {
            lowmem: 64 * MIB,
            highmem: 0,
        };
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(layout.total()).unwrap();
        let mem = MemFile::new(file.try_clone().unwrap(), layout).unwrap();
        (GuestRam::map(file, layout).unwrap(), mem)
    }

    fn file(bytes: &[u8]) -> FileSource {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        FileSource::new(file).unwrap()
    }

    #[test]
    fn files_and_bytes_arrive_whole() {
        let pattern = |seed: u32| -> Vec<u8> {
            let next = |n: &mut u32| {
                *n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                Some((*n >> 24) as u8)
            };
            std::iter::from_fn({
                let mut state = seed;
                move || next(&mut state)
            })
            .take(21 * MIB as usize + 777)
            .collect()
        };
        let (plain, expanded) = (pattern(1), pattern(2));
        let source = file(&plain);
        let segment = |offset, filesz, gpa| Segment {
            offset,
            filesz,
            memsz: filesz,
            gpa,
        };
        // From the middle of a page and of a huge page, over several pieces; and a little one.
        let long = segment(5, 20 * MIB, 3 * MIB + 100);
        let short = segment(20 * MIB + 9, 700, 25 * MIB + 3);
        let other = segment(0, expanded.len() as u64, 30 * MIB);
        let jobs = [
            Job {
                from: &source,
                segments: &[long, short],
            },
            Job {
                from: &expanded,
                segments: std::slice::from_ref(&other),
            },
        ];
        let (ram, mem) = memory();
        let room = Room {
            gpa: 56 * MIB,
            len: 8 * MIB,
        };
        bring(&jobs, &[room], &ram, &mut Progress::hidden()).unwrap();
        for (segment, from) in [(long, &plain), (short, &plain), (other, &expanded)] {
            let mut found = vec![0; segment.filesz as usize];
            mem.read(segment.gpa, &mut found).unwrap();
            let start = segment.offset as usize;
            assert!(found == from[start..start + found.len()], "{segment:?}");
        }
    }

    #[test]
    fn a_file_that_became_shorter_is_an_error() {
        let source = file(&[1; 12 * MIB as usize]);
        source.file().unwrap().set_len(9 * MIB).unwrap();
        let segments = [Segment {
            offset: 0,
            filesz: 12 * MIB,
            memsz: 12 * MIB,
            gpa: 16 * MIB,
        }];
        let jobs = [Job {
            from: &source,
            segments: &segments,
        }];
        let (ram, _) = memory();
        let (job, error) = bring(&jobs, &[], &ram, &mut Progress::hidden()).unwrap_err();
        assert!(matches!(error, CopyError::Read { .. }), "{job}: {error}");
    }
}
