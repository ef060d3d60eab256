//! Just enough of BTF (the kernel's type format, Documentation/bpf/btf.rst) to say how a map's keys and values are
//! laid out, and how bytes of one layout become bytes of another: field by field, by name.
//!
//! A field whose meaning changes must get another name; one that keeps its name keeps its value.

use std::fmt::Write as _;

const MAGIC: u16 = 0xeb9f;
/// More than any struct of ours has; a struct that has more is refused, not cut.
const MAX_FIELDS: usize = 4096;
/// Typedefs, arrays and structs inside each other.
const MAX_DEPTH: usize = 32;

/// The types of one object.
#[derive(Debug)]
pub(crate) struct Types {
    types: Vec<Type>,
}

#[derive(Debug)]
enum Type {
    Scalar {
        size: u32,
    },
    Array {
        element: u32,
        count: u32,
    },
    Struct {
        name: String,
        size: u32,
        members: Vec<Member>,
    },
    Alias {
        of: u32,
    },
    Other,
}

#[derive(Debug)]
struct Member {
    name: String,
    of: u32,
    offset: u32,
}

/// How a key or a value is laid out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    size: u32,
    fields: Vec<Field>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Field {
    path: String,
    offset: u32,
    size: u32,
}

impl Types {
    /// Reads raw BTF; `None` if it is not well formed.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        if u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let header = word(bytes, 4)? as usize;
        let section = |offset_at, length_at| {
            let start = header.checked_add(word(bytes, offset_at)? as usize)?;
            bytes.get(start..start.checked_add(word(bytes, length_at)? as usize)?)
        };
        let (mut rest, strings) = (section(8, 12)?, section(16, 20)?);
        // Type 0 is void.
        let mut types = vec![Type::Other];
        while !rest.is_empty() {
            let (parsed, length) = parse_type(rest, strings)?;
            types.push(parsed);
            rest = rest.get(length..)?;
        }
        Some(Self { types })
    }

    /// The layout of the struct of a name.
    pub(crate) fn layout_of(&self, name: &str) -> Option<Layout> {
        let is_it =
            |found: &Type| matches!(found, Type::Struct { name: other, .. } if other == name);
        let id = self.types.iter().position(is_it)?;
        self.layout(u32::try_from(id).ok()?)
    }

    /// The layout of a type; `None` if it has no fixed one, or if it is larger than anything of ours.
    pub(crate) fn layout(&self, id: u32) -> Option<Layout> {
        let mut fields = Vec::new();
        let size = self.flatten(id, "", 0, &mut fields, 0)?;
        Some(Layout { size, fields })
    }

    fn flatten(
        &self,
        id: u32,
        path: &str,
        offset: u32,
        fields: &mut Vec<Field>,
        depth: usize,
    ) -> Option<u32> {
        if depth > MAX_DEPTH || fields.len() > MAX_FIELDS {
            return None;
        }
        match self.types.get(id as usize)? {
            Type::Scalar { size } => {
                fields.push(Field {
                    path: path.to_owned(),
                    offset,
                    size: *size,
                });
                Some(*size)
            }
            Type::Alias { of } => self.flatten(*of, path, offset, fields, depth + 1),
            Type::Array { element, count } => {
                let mut total = 0;
                for index in 0..*count {
                    let path = format!("{path}[{index}]");
                    total += self.flatten(*element, &path, offset + total, fields, depth + 1)?;
                }
                Some(total)
            }
            Type::Struct { size, members, .. } => {
                for member in members {
                    let path = format!("{path}.{}", member.name);
                    self.flatten(member.of, &path, offset + member.offset, fields, depth + 1)?;
                }
                Some(*size)
            }
            Type::Other => None,
        }
    }
}

impl Layout {
    /// Size in bytes.
    pub(crate) fn size(&self) -> usize {
        self.size as usize
    }

    /// Where a field is.
    pub(crate) fn offset_of(&self, field: &str) -> Option<usize> {
        let is_it = |other: &&Field| other.path.strip_prefix('.') == Some(field);
        let found = self.fields.iter().find(is_it);
        found.map(|field| field.offset as usize)
    }

    /// Everything that makes two layouts the same, as text.
    pub(crate) fn describe(&self, to: &mut String) {
        // Writing to a String cannot fail.
        let _ = write!(to, "{} bytes", self.size);
        for Field { path, offset, size } in &self.fields {
            let _ = write!(to, "; {path} {offset} {size}");
        }
    }

    /// For each byte of this layout the byte of `old` that it comes from: fields of the same name. An integer that
    /// has grown keeps its value. What is new is zero.
    pub(crate) fn plan_from(&self, old: &Self) -> Vec<Option<u32>> {
        let mut plan = vec![None; self.size()];
        for field in &self.fields {
            let same = |other: &&Field| other.path == field.path && other.size <= field.size;
            let Some(from) = old.fields.iter().find(same) else {
                continue;
            };
            // Little-endian machines only (as are all that Heddle runs on) when the size differs.
            if from.size != field.size && cfg!(target_endian = "big") {
                continue;
            }
            for byte in 0..from.size {
                if let Some(to) = plan.get_mut((field.offset + byte) as usize) {
                    *to = Some(from.offset + byte);
                }
            }
        }
        plan
    }
}

/// Applies a plan of [`Layout::plan_from`].
pub(crate) fn convert(plan: &[Option<u32>], old: &[u8]) -> Vec<u8> {
    let byte = |from: &Option<u32>| from.and_then(|at| old.get(at as usize).copied());
    plan.iter().map(|from| byte(from).unwrap_or(0)).collect()
}

/// One type and its length.
fn parse_type(bytes: &[u8], strings: &[u8]) -> Option<(Type, usize)> {
    let (info, size_or_type) = (word(bytes, 4)?, word(bytes, 8)?);
    let (count, kind) = (info & 0xffff, info >> 24 & 0x1f);
    let has_bitfields = info >> 31 == 1;
    let variable = |each: usize| 12 + count as usize * each;
    let scalar = Type::Scalar { size: size_or_type };
    let alias = Type::Alias { of: size_or_type };
    Some(match kind {
        1 => (scalar, 16),
        2 => (Type::Scalar { size: 8 }, 12),
        3 => (
            Type::Array {
                element: word(bytes, 12)?,
                count: word(bytes, 20)?,
            },
            24,
        ),
        4 | 5 => {
            let members = (0..count as usize).map(|index| {
                let at = 12 + index * 12;
                let bits = word(bytes, at + 8)?;
                Some(Member {
                    name: text(strings, word(bytes, at)?)?,
                    of: word(bytes, at + 4)?,
                    offset: if has_bitfields {
                        bits & 0xff_ffff
                    } else {
                        bits
                    } / 8,
                })
            });
            let parsed = Type::Struct {
                name: text(strings, word(bytes, 0)?)?,
                size: size_or_type,
                members: members.collect::<Option<_>>()?,
            };
            (parsed, variable(12))
        }
        6 => (scalar, variable(8)),
        7 | 12 => (Type::Other, 12),
        8..=11 | 18 => (alias, 12),
        13 => (Type::Other, variable(8)),
        14 | 17 => (Type::Other, 16),
        15 => (Type::Other, variable(12)),
        16 => (scalar, 12),
        19 => (scalar, variable(12)),
        _ => return None,
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn text(strings: &[u8], at: u32) -> Option<String> {
    let rest = strings.get(at as usize..)?;
    let end = rest.iter().position(|byte| *byte == 0)?;
    Some(String::from_utf8_lossy(&rest[..end]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(fields: &[(&str, u32, u32)], size: u32) -> Layout {
        let fields = fields.iter().map(|(path, offset, size)| Field {
            path: (*path).into(),
            offset: *offset,
            size: *size,
        });
        Layout {
            size,
            fields: fields.collect(),
        }
    }

    #[test]
    fn fields_keep_their_values_by_name() {
        let old = layout(&[(".a", 0, 4), (".gone", 4, 4), (".b", 8, 2)], 12);
        let new = layout(&[(".b", 0, 4), (".new", 4, 4), (".a", 8, 4)], 12);
        let bytes = [1, 2, 3, 4, 9, 9, 9, 9, 7, 8, 0, 0];
        let plan = new.plan_from(&old);
        assert_eq!(
            convert(&plan, &bytes),
            [7, 8, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4],
            "b grew, a moved, new is zero"
        );
        assert_eq!(convert(&old.plan_from(&old), &bytes)[..10], bytes[..10]);
    }

    #[test]
    fn what_is_not_btf_is_refused() {
        assert!(Types::parse(&[]).is_none());
        assert!(Types::parse(&[0x9f, 0xeb, 1, 0]).is_none());
        let mut cut = vec![0x9f, 0xeb, 1, 0];
        for word in [24u32, 0, 12, 12, 1] {
            cut.extend(word.to_ne_bytes());
        }
        // A struct that promises more members than there are.
        for word in [0u32, 4 << 24 | 3, 8] {
            cut.extend(word.to_ne_bytes());
        }
        cut.push(0);
        assert!(Types::parse(&cut).is_none());
    }

    #[test]
    fn a_type_that_contains_itself_has_no_layout() {
        let types = Types {
            types: vec![Type::Other, Type::Alias { of: 1 }],
        };
        assert!(types.layout(1).is_none());
        assert!(types.layout(0).is_none());
        assert!(types.layout(7).is_none());
    }
}
