// Package toc knows a layer's table of contents (TOC), whatever its format: what
// files the layer has, and where in the blob each chunk of them lies.
//
// A lazy layer is a tar that was compressed in many pieces, its members: gzip members
// (eStargz) or zstd frames (zstd:chunked), so that each can be inflated alone. Behind
// them is a list in JSON of the tar's entries with the chunks of each regular file:
// member, size, SHA-256. The very end of the blob, its footer, tells where that list is. The digest of
// the list stands in the manifest, as an annotation of the layer's descriptor, and makes the
// chain of trust complete: manifest, TOC, chunk.
//
//	[member]…[member] [TOC] [footer]
//
// What goes in: annotations, the end of a blob, the compressed TOC ([Promised], [Locate],
// [ParseFooter], [Parse]); or the whole tar of a layer that has none of this
// ([FromTar]). What comes out is a [TOC], which is immutable. [JSONWriter] is the way back. A [Table]
// is a TOC without names, in a file, for who needs only chunks.
//
// What it never does:
//
//   - It returns nothing of a TOC that is not what the manifest promises, and takes no TOC that
//     the manifest promises nothing about.
//   - No name that it returns leaves the root, or is one that Linux cannot have.
//   - No file has bytes that no chunk covers, or that two do. No chunk but a hole is without a digest, or
//     outside of the members.
//   - No xattr is overlayfs's own.
//   - It needs no more memory than the Max constants allow, whatever is sent to it.
//   - It does not follow links or look at whether a parent is a directory: names
//     are checked one by one here, as a tree by fs/meta.
//
// All functions may be called concurrently. A JSONWriter belongs to one goroutine.
//
// Sources:
//
//   - eStargz: https://github.com/containerd/stargz-snapshotter/blob/main/docs/estargz.md
//   - zstd:chunked: https://github.com/containers/storage/tree/main/pkg/chunked, and
//     https://github.com/containerd/stargz-snapshotter/tree/main/estargz/zstdchunked
//   - stargz, where it began: https://github.com/google/crfs
//   - tar in layers: https://github.com/opencontainers/image-spec/blob/main/layer.md
package toc
