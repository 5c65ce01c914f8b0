//! Where the members of a kernel's structures are: BTF, the type information that Linux carries in
//! its image (Documentation/bpf/btf.rst).
//!
//! A header, then types one after the other, then strings. A type's number is its place, so they are
//! walked once to learn where each begins; names are compared where they stand.

use super::super::GuestError;

const MAGIC: u16 = 0xeb9f;
const HEADER: usize = 24;
/// As many types as a kernel could have; Debian's has 130,000.
const TYPES_MAX: usize = 4_000_000;
/// How deep anonymous structures and chains of typedefs are followed.
const DEPTH_MAX: u32 = 32;

const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
/// PTR, and TYPEDEF, VOLATILE, CONST, RESTRICT, which name another type.
const KIND_PTR: u32 = 2;
const KIND_TYPEDEF: u32 = 8;
const KIND_RESTRICT: u32 = 11;

/// A member of a structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Bytes from the structure's beginning.
    pub offset: u64,
    /// Its size in bytes; of an array that of the whole.
    pub size: u64,
}

/// A kernel's types.
pub struct Btf {
    types: Vec<u8>,
    strings: Vec<u8>,
    /// Where each type begins; number 0 is void and has no place.
    starts: Vec<u32>,
}

#[derive(Clone, Copy)]
struct Type {
    at: usize,
    name: u32,
    info: u32,
    /// Bytes, or another type's number.
    size: u32,
}

impl Type {
    fn kind(self) -> u32 {
        self.info >> 24 & 0x1f
    }

    fn members(self) -> u32 {
        self.info & 0xffff
    }

    /// Bytes of what follows the type itself; none for an unknown kind.
    fn tail(self) -> Option<usize> {
        let members = self.members() as usize;
        Some(match self.kind() {
            // INT, VAR, DECL_TAG.
            1 | 14 | 17 => 4,
            // PTR, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FLOAT, TYPE_TAG.
            2 | 7..=12 | 16 | 18 => 0,
            KIND_ARRAY => 12,
            // STRUCT, UNION, DATASEC, ENUM64.
            4 | 5 | 15 | 19 => members * 12,
            // ENUM, FUNC_PROTO.
            6 | 13 => members * 8,
            _ => return None,
        })
    }
}

impl Btf {
    /// Reads all of it.
    ///
    /// # Errors
    ///
    /// It is none, or cut off.
    pub fn parse(bytes: &[u8]) -> Result<Self, GuestError> {
        let damaged = |what: &str| GuestError::Damaged(format!("the kernel's BTF has {what}"));
        let cut = || damaged("an end before its end");
        if word(bytes, 0).map(|w| w as u16) != Some(MAGIC) {
            return Err(damaged("no BTF header"));
        }
        let field = |at| word(bytes, at).map(|w| w as usize).ok_or_else(cut);
        let header = field(4)?;
        let section = |at| {
            let (start, len) = (field(at)?, field(at + 4)?);
            let start = header.checked_add(start).ok_or_else(cut)?;
            let end = start.checked_add(len).ok_or_else(cut)?;
            Ok::<_, GuestError>(bytes.get(start..end).ok_or_else(cut)?.to_vec())
        };
        let (types, strings) = (section(8)?, section(16)?);
        let mut btf = Self {
            types,
            strings,
            starts: vec![0],
        };
        let mut at = 0;
        while at < btf.types.len() {
            if btf.starts.len() > TYPES_MAX {
                return Err(damaged("too many types"));
            }
            let found = btf.read(at).ok_or_else(cut)?;
            btf.starts.push(u32::try_from(at).map_err(|_| cut())?);
            let tail = found.tail().ok_or_else(|| damaged("an unknown kind"))?;
            at += 12 + tail;
        }
        if at != btf.types.len() {
            return Err(cut());
        }
        Ok(btf)
    }

    /// How many bytes it has as a whole, by its header.
    pub fn size(header: &[u8; HEADER]) -> Option<u64> {
        let field = |at| word(header, at).map(u64::from);
        (field(0)? as u16 == MAGIC).then_some(())?;
        let end = |at| Some(field(at)? + field(at + 4)?);
        Some(field(4)? + end(8)?.max(end(16)?))
    }

    /// A member of a structure, by `.` through members that are structures themselves; members of
    /// anonymous structures and unions count as the outer one's.
    ///
    /// # Errors
    ///
    /// There is no such structure or member.
    pub fn member(&self, structure: &str, path: &str) -> Result<Member, GuestError> {
        let missing = || GuestError::NoType(format!("{structure} ({path})"));
        let mut inside = self.structure(structure).ok_or_else(missing)?;
        let mut found = Member { offset: 0, size: 0 };
        for (n, name) in path.split('.').enumerate() {
            if n > 0 && !matches!(inside.kind(), KIND_STRUCT | KIND_UNION) {
                return Err(missing());
            }
            let (offset, of) = self.find(inside, name, 0).ok_or_else(missing)?;
            inside = self.resolve(of).ok_or_else(missing)?;
            found = Member {
                offset: found.offset + offset,
                size: self.size_of(inside, 0).ok_or_else(missing)?,
            };
        }
        Ok(found)
    }

    /// Bytes of a structure.
    ///
    /// # Errors
    ///
    /// There is no such structure.
    pub fn size_of_struct(&self, structure: &str) -> Result<u64, GuestError> {
        let found = self.structure(structure);
        let found = found.ok_or_else(|| GuestError::NoType(structure.to_owned()))?;
        Ok(found.size.into())
    }

    fn structure(&self, name: &str) -> Option<Type> {
        let numbers = 1..self.starts.len();
        let mut types = numbers.filter_map(|number| self.get(number as u32));
        types.find(|t| matches!(t.kind(), KIND_STRUCT | KIND_UNION) && self.is_named(t.name, name))
    }

    /// The byte offset of a member, and its type's number.
    fn find(&self, inside: Type, name: &str, depth: u32) -> Option<(u64, u32)> {
        if depth > DEPTH_MAX {
            return None;
        }
        for n in 0..inside.members() as usize {
            let at = inside.at + 12 + 12 * n;
            let named = word(&self.types, at)?;
            let of = word(&self.types, at + 4)?;
            let bits = word(&self.types, at + 8)?;
            // With kind_flag the upper byte is a bit field's size.
            let bits = if inside.info >> 31 == 1 {
                bits & 0xff_ffff
            } else {
                bits
            };
            let offset = u64::from(bits / 8);
            if self.is_named(named, name) {
                return Some((offset, of));
            }
            let anonymous = self.strings.get(named as usize) == Some(&0);
            let inner = self.resolve(of).filter(|_| anonymous);
            let inner = inner.filter(|t| matches!(t.kind(), KIND_STRUCT | KIND_UNION));
            if let Some((more, of)) = inner.and_then(|t| self.find(t, name, depth + 1)) {
                return Some((offset + more, of));
            }
        }
        None
    }

    /// A type, behind all names and qualifiers.
    fn resolve(&self, number: u32) -> Option<Type> {
        let mut found = self.get(number)?;
        for _ in 0..DEPTH_MAX {
            // TYPE_TAG is 18.
            if !matches!(found.kind(), KIND_TYPEDEF..=KIND_RESTRICT | 18) {
                return Some(found);
            }
            found = self.get(found.size)?;
        }
        None
    }

    fn size_of(&self, found: Type, depth: u32) -> Option<u64> {
        match found.kind() {
            _ if depth > DEPTH_MAX => None,
            KIND_PTR => Some(8),
            KIND_ARRAY => {
                let element = self.resolve(word(&self.types, found.at + 12)?)?;
                let count = word(&self.types, found.at + 20)?;
                self.size_of(element, depth + 1)?.checked_mul(count.into())
            }
            _ => Some(found.size.into()),
        }
    }

    fn get(&self, number: u32) -> Option<Type> {
        let at = self.starts.get(number as usize).filter(|_| number > 0)?;
        self.read(*at as usize)
    }

    fn read(&self, at: usize) -> Option<Type> {
        Some(Type {
            at,
            name: word(&self.types, at)?,
            info: word(&self.types, at + 4)?,
            size: word(&self.types, at + 8)?,
        })
    }

    fn is_named(&self, at: u32, name: &str) -> bool {
        let Some(text) = self.strings.get(at as usize..) else {
            return false;
        };
        text.strip_prefix(name.as_bytes())
            .is_some_and(|rest| rest.first() == Some(&0))
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Types as a kernel has them.
    pub(crate) struct Types {
        types: Vec<u32>,
        strings: Vec<u8>,
        count: u32,
    }

    impl Types {
        pub(crate) fn new() -> Self {
            Self {
                types: Vec::new(),
                strings: vec![0],
                count: 0,
            }
        }

        fn add(&mut self, name: &str, info: u32, size: u32, tail: &[u32]) -> u32 {
            let name = self.name(name);
            self.types.extend([name, info, size]);
            self.types.extend(tail);
            self.count += 1;
            self.count
        }

        fn name(&mut self, name: &str) -> u32 {
            if name.is_empty() {
                return 0;
            }
            let at = self.strings.len() as u32;
            self.strings.extend(name.as_bytes());
            self.strings.push(0);
            at
        }

        pub(crate) fn int(&mut self, size: u32) -> u32 {
            self.add("int", 1 << 24, size, &[8 * size])
        }

        pub(crate) fn pointer(&mut self, to: u32) -> u32 {
            self.add("", KIND_PTR << 24, to, &[])
        }

        pub(crate) fn array(&mut self, of: u32, count: u32) -> u32 {
            self.add("", KIND_ARRAY << 24, 0, &[of, of, count])
        }

        pub(crate) fn alias(&mut self, name: &str, of: u32) -> u32 {
            self.add(name, KIND_TYPEDEF << 24, of, &[])
        }

        /// Members are name, type, byte offset.
        pub(crate) fn structure(
            &mut self,
            name: &str,
            size: u32,
            members: &[(&str, u32, u32)],
        ) -> u32 {
            self.of_kind(KIND_STRUCT, name, size, members)
        }

        fn of_kind(
            &mut self,
            kind: u32,
            name: &str,
            size: u32,
            members: &[(&str, u32, u32)],
        ) -> u32 {
            let tail: Vec<u32> = members
                .iter()
                .flat_map(|&(name, of, offset)| [self.name(name), of, 8 * offset])
                .collect();
            self.add(name, kind << 24 | members.len() as u32, size, &tail)
        }

        pub(crate) fn bytes(&self) -> Vec<u8> {
            let types: Vec<u8> = self.types.iter().flat_map(|w| w.to_le_bytes()).collect();
            let mut bytes = vec![0x9f, 0xeb, 1, 0];
            let header = [24, 0, types.len(), types.len(), self.strings.len()];
            bytes.extend(header.iter().flat_map(|&w| (w as u32).to_le_bytes()));
            [&bytes[..], &types, &self.strings].concat()
        }
    }

    /// struct list { struct list *next; };
    /// struct task { int pid; union { u64 word; struct { char name[16]; }; }; struct list tasks; };
    fn sample() -> Vec<u8> {
        let mut types = Types::new();
        let (int, long) = (types.int(4), types.int(8));
        // The list's own number is the next but one.
        let pointer = types.pointer(4);
        let list = types.structure("list", 8, &[("next", pointer, 0)]);
        let char = types.int(1);
        let array = types.array(char, 16);
        let inner = types.structure("", 16, &[("comm", array, 0)]);
        let either = types.of_kind(KIND_UNION, "", 16, &[("word", long, 0), ("", inner, 0)]);
        let alias = types.alias("alias", list);
        let members = [("pid", int, 0), ("", either, 8), ("tasks", alias, 24)];
        types.structure("task", 32, &members);
        types.bytes()
    }

    #[test]
    fn members_are_found_through_anonymous_structures_and_names() {
        let btf = Btf::parse(&sample()).unwrap();
        let member = |path| {
            let found = btf.member("task", path);
            found.map(|m| (m.offset, m.size)).ok()
        };
        assert_eq!(member("pid"), Some((0, 4)));
        assert_eq!(member("comm"), Some((8, 16)));
        assert_eq!(member("tasks.next"), Some((24, 8)));
        assert_eq!(member("tasks.next.next"), None);
        assert_eq!(member("uid"), None);
        assert!(btf.member("process", "pid").is_err());
        assert_eq!(btf.size_of_struct("task").unwrap(), 32);
        let bytes = sample();
        let size = Btf::size(bytes.first_chunk().unwrap());
        assert_eq!(size, Some(bytes.len() as u64));
    }

    proptest::proptest! {
        #[test]
        fn no_change_makes_it_panic(at: proptest::sample::Index, word: u32) {
            let mut bytes = sample();
            let at = at.index(bytes.len() - 4);
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
            for bytes in [&bytes[..], &bytes[..at]] {
                if let Ok(btf) = Btf::parse(bytes) {
                    for path in ["pid", "comm", "tasks.next", "word"] {
                        let _ = btf.member("task", path);
                    }
                }
            }
        }
    }
}
