// Package convert turns an ordinary image into a lazy one: its layers become
// archives that can be read piece by piece, and everything else stays as it is.
//
// [Image] reads an image or an index from a registry, an OCI layout or an archive and
// writes the result to any of these. What comes out is an ordinary image too: every client
// can pull it, and the tar in each layer has the entries of the original, in their order, with the same
// bytes in their headers. Only what a runtime needs is added: a table of contents at the end,
// and a landmark, an empty promise of a file that says how much to fetch ahead.
//
// # What a layer becomes
//
// Three units matter, each inside the next:
//
//   - A chunk is a piece of one file. It has a digest in the table of contents, so it is what can be
//     verified by itself.
//   - A member is one compressed stream (a gzip member, a zstd frame), so it is what must be
//     fetched by itself. A large file has one member for each chunk. Small files
//     share members, up to the size of a group: alone they would hardly compress.
//   - The blob is the members one after the other, the table of contents, and a footer that says
//     where that is. Decompressed as a whole it is a tar.
//
// Small chunks make a start fetch less, large ones make the blob smaller. The defaults
// are a choice from what was measured: docs/convert.md has the table and the command that makes it.
//
// # How it is made
//
// Every layer is a stream, from the source to a temporary file without a name: the blob is read and its
// digest checked, inflated, parsed as a tar, and cut into members. All layers of all platforms go side by side and share
// one pool of workers, which compress members and compute the digests of their chunks. A layer's writer
// takes the finished members in order; offsets, the diffID and the table of contents are made there.
// Where a member ends depends on the tar alone, so the same input gives the same digests on any number of CPUs.
//
// Memory is bounded by the pool: it has a fixed number of members, and who wants to read on waits
// for one. No layer or file is too large, and no buffer or compressor is made per file. A profile, which
// changes the order of a layer, takes room for the uncompressed layer in the temporary directory.
//
// # What is not changed
//
// Manifests, configs and indexes are edited as JSON, not through structs, so fields stay that no specification knows.
// In a config only the diffIDs change; there are as many layers as before, so the history fits. In an index
// only digests and sizes change. Attestations go over as they are, because what they say is of the
// original; the annotation of the index that ties one to an image follows the image. Layers that are lazy,
// are no tar, or must not be distributed are kept. If that is all there is, the manifest is kept too, byte for byte.
// Docker's media types become OCI's: a lazy layer needs annotations, which docker's do not have.
//
// # Not twice
//
// A converted layer's descriptor says from what and how it was made. So a layer that DST has in one of
// its images need not be converted again, and a cache remembers layers that are in other
// repositories, from where a registry mounts them without a transfer. Both are hints: a layer is taken only
// if DST has it. The tag is written last, layouts and archives are renamed into place, and
// temporary files have no names, so that an end at any time leaves nothing that has a tag.
//
// # Startup packs
//
// When the layers are in DST, the converter reads back by ranges what a startup pack (package pack) wants of them. With a
// profile, the pack has its files, the tables of contents and the config, and the manifest's annotations name it, which other clients
// ignore. Without one, an image in a registry gets a pack of what its command can be seen to need (package closure), beside it as an artifact that
// refers to it: a recorded one takes its place. The same image gives the same pack. That a pack could not be made is a
// warning and no error.
//
// Sources: the OCI image specification (https://github.com/opencontainers/image-spec), eStargz
// (https://github.com/containerd/stargz-snapshotter/blob/main/docs/estargz.md), RFC 1952 for gzip and RFC 8878 for zstd.
package convert
