package rootfs

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"lazuli/fs/remote"
	"lazuli/fs/toc"
)

// A LayerReport says what an image's layer is like.
type LayerReport struct {
	Digest    string `json:"digest"`
	MediaType string `json:"mediaType"`
	Size      int64  `json:"size"`   // of the blob, in bytes
	Format    string `json:"format"` // "estargz", "zstd:chunked" or "ordinary"
	Lazy      bool   `json:"lazy"`
	Why       string `json:"why,omitempty"`       // why it is not lazy
	TOC       string `json:"toc,omitempty"`       // the digest that the manifest promises
	TOCSize   int64  `json:"tocSize,omitempty"`   // compressed, in bytes of the blob
	Entries   int    `json:"entries,omitempty"`   // in the tar, whiteouts included
	Chunks    int    `json:"chunks,omitempty"`    // of regular files
	Members   int    `json:"members,omitempty"`   // that hold chunks: what is fetched as one
	FileBytes int64  `json:"fileBytes,omitempty"` // of regular files, inflated
	// Prefetch is how many bytes at the blob's beginning hold the files that its maker put first, 0 if nobody did.
	Prefetch int64 `json:"prefetch,omitempty"`
	// Problems are what [Check] found wrong, a sentence each.
	Problems []string `json:"problems,omitempty"`
	// Checked counts the chunks whose digests [Check] compared.
	Checked int `json:"checked,omitempty"`
}

// A Report says what an image is like.
type Report struct {
	Reference string         `json:"reference"`
	Digest    string         `json:"digest"` // of the manifest
	MediaType string         `json:"mediaType"`
	Config    *v1.ConfigFile `json:"config"`
	Layers    []LayerReport  `json:"layers"` // the lowest first
}

// Problems is how many things [Check] found wrong.
func (r *Report) Problems() int {
	sum := 0
	for _, l := range r.Layers {
		sum += len(l.Problems)
	}
	return sum
}

// InspectOptions configures Inspect and Check.
type InspectOptions struct {
	Hosts    string         // containerd's directory of registry hosts; "" is none
	Platform *v1.Platform   // nil is this machine's
	Keychain authn.Keychain // nil is docker's configuration and credential helpers
	Progress func(n int64)  // called by Check with bytes that came, from several goroutines; nil drops it
}

// Inspect reports on an image from its manifest, its config and its tables of contents, which are fetched and verified.
func Inspect(ctx context.Context, ref remote.Reference, o InspectOptions) (*Report, error) {
	return report(ctx, ref, o, func(ctx context.Context, l *layer, r *LayerReport) error {
		if l.why != nil {
			return nil
		}
		t, _, err := l.fetchTOC(ctx)
		if errors.Is(err, toc.ErrNotLazy) {
			l.ordinary(err)
			return nil
		}
		if err != nil {
			return err
		}
		return r.describe(t)
	})
}

// Check fetches all of an image and compares it with what its manifest says: every blob's digest, every diffID, every table of
// contents with its digest and with the tar, every chunk. What is wrong is in the report; an error means that it
// could not be found out.
func Check(ctx context.Context, ref remote.Reference, o InspectOptions) (*Report, error) {
	return report(ctx, ref, o, func(ctx context.Context, l *layer, r *LayerReport) error {
		return l.check(ctx, r, &MountOptions{Progress: o.Progress})
	})
}

func report(ctx context.Context, ref remote.Reference, o InspectOptions, look func(context.Context, *layer, *LayerReport) error) (*Report, error) {
	src, err := remote.Open(ctx, ref, remote.Options{Keychain: o.Keychain, Hosts: o.Hosts})
	if err != nil {
		return nil, err
	}
	defer src.Close()
	image, err := remote.Pick(ctx, src, o.Platform)
	if err != nil {
		return nil, err
	}
	config, _, err := image.Config(ctx)
	if err != nil {
		return nil, fmt.Errorf("%v: %w", ref, err)
	}
	if got, want := len(config.RootFS.DiffIDs), len(image.Layers); got != want {
		return nil, fmt.Errorf("%v: the config has %d diffIDs for %d layers", ref, got, want)
	}
	r := &Report{
		Reference: ref.String(), Digest: image.Digest.String(), MediaType: string(image.Manifest.MediaType),
		Config: config, Layers: make([]LayerReport, len(image.Layers)),
	}
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(sideBySide)
	for i, rl := range image.Layers {
		group.Go(func() error {
			l, err := newLayer(rl, config.RootFS.DiffIDs[i])
			if err != nil {
				return err
			}
			p := &r.Layers[i]
			p.Digest, p.MediaType, p.Size, p.Format = l.Digest.String(), string(l.MediaType), l.Size, "ordinary"
			if err := look(gctx, l, p); err != nil {
				return fmt.Errorf("%s: %w", l.name(), err)
			}
			if p.Lazy = l.why == nil; p.Lazy {
				p.TOC = l.promise.Digest.String()
			} else {
				p.Why = reason(l.why)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, fmt.Errorf("%v: %w", ref, err)
	}
	return r, nil
}

// describe fills in what the table of contents says.
func (r *LayerReport) describe(t *toc.TOC) error {
	r.Format = map[toc.Compression]string{toc.Gzip: "estargz", toc.Zstd: "zstd:chunked", toc.Whole: "ordinary"}[t.Compression]
	r.Entries, r.Chunks, r.Prefetch = len(t.Entries), len(t.Chunks), t.PrefetchEnd
	r.TOCSize = r.Size - t.DataEnd
	for i := range t.Entries {
		r.FileBytes += t.Entries[i].Size
	}
	members := map[int64]bool{}
	for i := range t.Chunks {
		if !t.Chunks[i].Hole {
			members[t.Chunks[i].Member] = true
		}
	}
	r.Members = len(members)
	return nil
}

func (r *LayerReport) problem(format string, args ...any) {
	r.Problems = append(r.Problems, fmt.Sprintf(format, args...))
}

// check fetches the layer into a temporary file and looks at all of it.
func (l *layer) check(ctx context.Context, r *LayerReport, o *MountOptions) error {
	f, err := os.CreateTemp("", "lazuli-check-")
	if err != nil {
		return err
	}
	defer f.Close()
	os.Remove(f.Name()) // it vanishes when it is closed, however we end
	blob := &wholeBlob{ctx: ctx, blob: l.Blob, size: l.Size, o: o}
	defer blob.Close()
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, sum), blob)
	if err != nil {
		if ctx.Err() != nil {
			return err
		}
		r.problem("the blob cannot be read to its end: %v", err)
	}
	if got := toc.Digest(sum.Sum(nil)); n == l.Size && got.String() != l.Digest.String() {
		r.problem("the blob's digest is %v", got)
	}
	file := io.NewSectionReader(f, 0, n)

	var t *toc.TOC
	if l.why == nil {
		t = l.checkTOC(f, n, r)
	}
	// The tar, as somebody who does not know about tables of contents reads it.
	var tar *toc.TOC
	same := comparison{t: t}
	z, err := toc.OpenTar(file)
	if err == nil {
		tar, err = toc.FromTar(z, toc.MaxChunkSize, func(c toc.Chunk, data []byte) error {
			if t != nil {
				same.data(c, data)
			}
			return ctx.Err()
		})
		z.Close()
	}
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		at, _ := file.Seek(0, io.SeekCurrent)
		r.problem("the tar cannot be read beyond byte %d of the blob or somewhat before: %v", at, err)
	case tar.Digest.String() != l.diffID.String():
		r.problem("the diffID is %v, but the config says %v", tar.Digest, l.diffID)
	}
	if t == nil {
		return nil
	}
	if err := r.describe(t); err != nil {
		return err
	}
	if tar != nil {
		compareEntries(t, tar, r)
		if same.problem != "" {
			r.problem("%s", same.problem)
		}
	}
	return l.checkChunks(ctx, f, t, r)
}

// checkTOC returns the table of contents in a blob of n bytes, or nil if it is not sound.
func (l *layer) checkTOC(f *os.File, n int64, r *LayerReport) *toc.TOC {
	tail := make([]byte, min(n, toc.FooterSize))
	if _, err := f.ReadAt(tail, n-int64(len(tail))); err != nil {
		r.problem("footer: %v", err)
		return nil
	}
	footer, err := toc.ParseFooter(tail, n)
	if err != nil {
		r.problem("%v", err)
	}
	said, known, locateErr := toc.Locate(l.Annotations, l.Size)
	switch {
	case locateErr != nil:
		r.problem("%v", locateErr)
		known = false
	case known && err == nil && (said.Offset != footer.Offset || said.Compression != footer.Compression):
		r.problem("the manifest says that the table of contents is at byte %d of the blob, the footer says %d", said.Offset, footer.Offset)
	}
	if !known {
		said = footer
		if err != nil {
			return nil
		}
	}
	t, err := toc.Parse(io.NewSectionReader(f, said.Offset, said.Size), said, l.promise)
	if errors.Is(err, toc.ErrNotLazy) {
		l.ordinary(err)
		return nil
	}
	if err != nil {
		r.problem("at byte %d of the blob: %v", said.Offset, err)
		return nil
	}
	return t
}

// compareEntries says where a table of contents and the tar tell different stories: a runtime that unpacks the layer
// would show other files than one that reads it lazily.
func compareEntries(t, tar *toc.TOC, r *LayerReport) {
	if len(t.Entries) != len(tar.Entries) {
		r.problem("the table of contents has %d entries, the tar has %d", len(t.Entries), len(tar.Entries))
		return
	}
	const enough = 10
	found := 0
	for i := range t.Entries {
		a, b := t.Entries[i], tar.Entries[i]
		if sameEntry(a, b) {
			continue
		}
		if found++; found <= enough {
			r.problem("%q is not the same in the table of contents (%+v) and in the tar (%+v)", b.Name, a, b)
		}
	}
	if found > enough {
		r.problem("%d more entries are not the same in the table of contents and in the tar", found-enough)
	}
}

// checkChunks compares every chunk with its digest.
func (l *layer) checkChunks(ctx context.Context, f *os.File, t *toc.TOC, r *LayerReport) error {
	var gz gzip.Reader
	zs, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return err
	}
	defer zs.Close()
	buf := make([]byte, 0, 1<<20)
	at := bufio.NewReaderSize(nil, 1<<16)
	var stream io.Reader // of the member begun last
	var member, pos int64 = -1, 0
	for i := range t.Entries {
		e := &t.Entries[i]
		for _, c := range t.Content(e) {
			if c.Hole {
				continue
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			if c.Member != member || c.Inner < pos {
				member, pos = c.Member, 0
				at.Reset(io.NewSectionReader(f, c.Member, t.DataEnd-c.Member))
				stream = &gz
				if t.Compression == toc.Zstd {
					stream, err = zs, zs.Reset(at)
				} else if err = gz.Reset(at); err == nil {
					gz.Multistream(false)
				}
				if err != nil {
					stream = nil
					r.problem("%q, bytes %d to %d: the member at byte %d of the blob does not begin: %v", e.Name, c.FileOffset, c.FileOffset+c.Size, c.Member, noEOF(err))
				}
			}
			if stream == nil {
				continue
			}
			if int64(cap(buf)) < c.Size {
				buf = make([]byte, 0, c.Size)
			}
			_, err := io.CopyN(io.Discard, stream, c.Inner-pos)
			if err == nil {
				_, err = io.ReadFull(stream, buf[:c.Size])
			}
			if err != nil {
				stream = nil
				r.problem("%q, bytes %d to %d: the member at byte %d of the blob cannot be inflated: %v", e.Name, c.FileOffset, c.FileOffset+c.Size, c.Member, noEOF(err))
				continue
			}
			pos = c.Inner + c.Size
			r.Checked++
			if got := toc.Digest(sha256.Sum256(buf[:c.Size])); got != c.Digest {
				r.problem("%q, bytes %d to %d (in the member at byte %d of the blob): the digest is %v, the table of contents says %v",
					e.Name, c.FileOffset, c.FileOffset+c.Size, c.Member, got, c.Digest)
			}
		}
	}
	return nil
}
