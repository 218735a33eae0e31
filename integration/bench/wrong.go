package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"lazuli/fs/pack"
	"lazuli/fs/toc"
)

// A wrongPack is a startup pack that is not what it should be, or does not come as it should.
type wrongPack struct {
	kind, what string
	// content makes what is served in the place of the image's pack; nil is that pack, and a size of 0 none.
	content func(ctx context.Context, w *world, im image) (section, error)
	// serve says how so many bytes come over a link; nil is as fast as it goes.
	serve func(size int64, l link) pace
}

// A section is bytes that need not be in memory.
type section struct {
	io.ReaderAt
	size int64
}

func inMemory(b []byte) section { return section{bytes.NewReader(b), int64(len(b))} }

var wrongPacks = []*wrongPack{
	{"none", "it has none, for comparison", func(context.Context, *world, image) (section, error) { return section{}, nil }, nil},
	{"flipped", "a bit of each frame is another", flippedPack, nil},
	{"foreign", "it is the pack of another image", foreignPack, nil},
	{"mixed", "it has the right index, and the bytes of another image's pack", mixedPack, nil},
	{"truncated", "the connection is closed after a third of it", nil, func(size int64, _ link) pace { return pace{cut: size / 3, slow: size} }},
	{"large", "it has 10 GB: all of the image, what the job needs last, each frame padded with as much", largePack, nil},
	{"endless", "after a third of it there comes a byte a second", nil, func(size int64, _ link) pace { return pace{cut: size, slow: size / 3, rate: 1} }},
	{"slow", "it comes with 1/50 of what the link carries, or of 1 Gbit/s", nil, func(size int64, l link) pace {
		if l.Mbit == 0 {
			l.Mbit = 1000
		}
		return pace{cut: size, rate: l.Mbit * 1e6 / 8 / 50}
	}},
	{"stalled", "after the answer's header there comes nothing", nil, func(size int64, _ link) pace { return pace{cut: size} }},
	{"refused", "the registry answers with an error", nil, func(int64, link) pace { return pace{refuse: true} }},
}

// wrongSystems are Lazuli with each of the wrong packs.
func wrongSystems() (list []*system) {
	for _, p := range wrongPacks {
		f := &form{name: wrong + "-" + p.kind, wrong: p}
		list = append(list, &system{f.name, "Lazuli, as for its startup pack: " + p.what, f, "lazuli", false})
	}
	return list
}

// pushWrong puts an artifact beside an image that is in the registry, as if it were the image's startup pack. The blob that it names is served by
// the proxy.
func (w *world) pushWrong(ctx context.Context, im image, to name.Reference, p *wrongPack) error {
	good := w.packs[im.Name]
	content := inMemory(good.blob)
	var err error
	if p.content != nil {
		if content, err = p.content(ctx, w, im); err != nil {
			return fmt.Errorf("startup pack, %s: %w", p.kind, err)
		}
	}
	if content.size == 0 {
		return nil
	}
	subject, err := remote.Head(to, w.past(ctx)...)
	if err != nil {
		return err
	}
	blob := static.NewLayer(good.blob, pack.MediaType) // the registry wants to have what a manifest names
	digest, err := blob.Digest()
	if err != nil {
		return err
	}
	if err := remote.WriteLayer(to.Context(), blob, w.past(ctx)...); err != nil {
		return err
	}
	artifact, err := mutate.AppendLayers(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), pack.MediaType), claimed{blob, content.size})
	if err != nil {
		return err
	}
	artifact = mutate.Subject(mutate.Annotations(artifact, map[string]string{
		pack.DigestAnnotation: digest.String(),
		pack.SizeAnnotation:   strconv.FormatInt(content.size, 10),
		pack.MadeAnnotation:   time.Now().UTC().Format(time.RFC3339),
	}), *subject).(v1.Image)
	id, err := artifact.Digest()
	if err != nil {
		return err
	}
	path := "/v2/" + to.Context().RepositoryStr() + "/blobs/" + digest.String()
	w.registry.instead(path, func(l link) http.Handler {
		if p.serve == nil {
			return content.handler(pace{cut: content.size, slow: content.size})
		}
		return content.handler(p.serve(content.size, l))
	})
	return remote.Write(to.Context().Digest(id.String()), artifact, w.past(ctx)...)
}

// claimed is a layer of which the manifest says that it has another size.
type claimed struct {
	v1.Layer
	size int64
}

func (c claimed) Size() (int64, error) { return c.size, nil }

// dataOf returns where the frames of a pack begin.
func dataOf(x *pack.Index) int64 {
	at := x.Start
	for _, t := range x.Tables {
		at += t.Size
	}
	return at
}

func flippedPack(_ context.Context, w *world, im image) (section, error) {
	p := w.packs[im.Name]
	b := bytes.Clone(p.blob)
	at := dataOf(p.index)
	for _, f := range p.index.Frames {
		b[at+int64(f.Size)/2] ^= 1
		at += int64(f.Size)
	}
	return inMemory(b), nil
}

// another returns the pack of another image: the one of py and ros that im is not.
func (w *world) another(ctx context.Context, im image) (*startupPack, error) {
	other := "ros"
	if im.Name == other {
		other = "py"
	}
	o, err := parseImage(other, w.Cache)
	if err == nil {
		err = o.build(ctx)
	}
	if err == nil {
		_, err = w.prepare(ctx, o, packed)
	}
	return w.packs[other], err
}

func foreignPack(ctx context.Context, w *world, im image) (section, error) {
	p, err := w.another(ctx, im)
	if err != nil {
		return section{}, err
	}
	return inMemory(p.blob), nil
}

func mixedPack(ctx context.Context, w *world, im image) (section, error) {
	other, err := w.another(ctx, im)
	if err != nil {
		return section{}, err
	}
	p := w.packs[im.Name]
	b := bytes.Clone(p.blob[:dataOf(p.index)])
	for frames := other.blob[dataOf(other.index):]; len(b) < len(p.blob); {
		b = append(b, frames...)
	}
	return inMemory(b[:len(p.blob)]), nil
}

// A large pack has so many bytes.
const largeSize = 10e9

// largePack is as bad as a pack can be whose bytes are all right. First come the files that the job does not need, not compressed, and behind each chunk as
// many zeros, which are said to be a chunk of an object that no layer has. Then come frames that have one chunk over and
// over, as many as it takes, and at last what the job needs, once.
func largePack(ctx context.Context, w *world, im image) (section, error) {
	needed := map[pack.Chunk]bool{}
	for _, f := range w.packs[im.Name].index.Frames {
		for _, c := range f.Chunks {
			needed[c] = true
		}
	}
	j, err := w.unpack(ctx, im)
	if err != nil {
		return section{}, err
	}
	all, err := w.pieces(ctx, im)
	if err != nil {
		return section{}, err
	}
	out, err := os.Create(filepath.Join(w.registry.dir, im.Name+".large")) // in memory
	if err != nil {
		return section{}, err
	}
	g := &large{file: out}
	var own, most []largeFrame
	var size int64
	for _, x := range all {
		data, ok := x.read(j.root)
		if !ok { // another layer has another file of that name
			continue
		}
		f := largeFrame{from: g.end, data: int64(len(data))}
		n, err := out.Write(data)
		g.end += int64(n)
		if err != nil {
			return section{}, err
		}
		if needed[x.Chunk] {
			f.set(x.Chunk)
			own = append(own, f)
			if f.data >= 64<<10 { // a pack has 2^20 chunks at most
				most = append(most, f)
			}
		} else {
			f.pad = true
			f.set(x.Chunk, pack.Chunk{Object: ^x.Object, Size: x.Size})
			g.frames = append(g.frames, f)
		}
		size += int64(f.Size)
	}
	for i := 0; size < largeSize && len(most) > 0; i++ {
		f := most[i%len(most)]
		f.set(slices.Repeat(f.Chunks, int(pack.MaxFrame/f.data))...)
		g.frames = append(g.frames, f)
		size += int64(f.Size)
	}
	g.frames = append(g.frames, own...)
	return g.section()
}

// A large is a large pack.
type large struct {
	head   []byte // the index
	frames []largeFrame
	file   *os.File // with their chunks
	end    int64    // of the file
}

// A largeFrame is one of its frames: a chunk's bytes, over and over, or once and then zeros.
type largeFrame struct {
	pack.Frame
	pad        bool
	from, data int64 // the chunk, in the file
	at         int64 // the frame, in the pack
}

func (f *largeFrame) set(chunks ...pack.Chunk) {
	f.Chunks, f.Size = chunks, 0
	for _, c := range chunks {
		f.Size += c.Size
	}
	f.Inflated = f.Size
}

// section makes the index, and checks it, as the format may have changed.
func (g *large) section() (section, error) {
	var b bytes.Buffer
	if _, err := new(pack.Builder).WriteTo(&b); err != nil { // one without anything in it
		return section{}, err
	}
	le := binary.LittleEndian
	head := b.Bytes()
	chunks := 0
	for _, f := range g.frames {
		for _, n := range []int{f.Size, f.Inflated, len(f.Chunks)} {
			head = le.AppendUint32(head, uint32(n))
		}
		chunks += len(f.Chunks)
	}
	le.PutUint32(head[12:], uint32(len(g.frames)))
	le.PutUint32(head[16:], uint32(chunks))
	for _, f := range g.frames {
		for _, c := range f.Chunks {
			head = binary.BigEndian.AppendUint64(head, c.Object)
			head = le.AppendUint32(head, uint32(c.Index))
			head = le.AppendUint32(head, uint32(c.Size))
		}
	}
	g.head = head
	size := int64(len(head))
	for i := range g.frames {
		g.frames[i].at = size
		size += int64(g.frames[i].Size)
	}
	x, err := pack.ReadIndex(bytes.NewReader(head))
	if err == nil && (x.Size != size || dataOf(x) != int64(len(head)) || len(x.Frames) != len(g.frames)) {
		err = fmt.Errorf("its index says %d bytes and %d frames, instead of %d and %d: has the format changed?", x.Size, len(x.Frames), size, len(g.frames))
	}
	return section{g, size}, err
}

// ReadAt returns less than was asked for where parts meet.
func (g *large) ReadAt(p []byte, off int64) (int, error) {
	if off < int64(len(g.head)) {
		return copy(p, g.head[off:]), nil
	}
	i, _ := slices.BinarySearchFunc(g.frames, off+1, func(f largeFrame, end int64) int { return cmp.Compare(f.at, end) })
	f := g.frames[i-1]
	off -= f.at
	switch {
	case off >= int64(f.Size):
		return 0, io.EOF
	case f.pad && off >= f.data:
		p = p[:min(int64(len(p)), int64(f.Size)-off)]
		clear(p)
		return len(p), nil
	}
	off %= f.data
	return g.file.ReadAt(p[:min(int64(len(p)), f.data-off)], f.from+off)
}

// A piece is a chunk of a file of an image.
type piece struct {
	pack.Chunk
	path   string
	off    int64 // in the file
	digest toc.Digest
}

// pieces returns the chunks of all files of an image in its lazy form, each once.
func (w *world) pieces(ctx context.Context, im image) (list []piece, err error) {
	dir, err := w.converted(ctx, im, packed)
	if err != nil {
		return nil, err
	}
	img, err := openLayout(dir)
	if err != nil {
		return nil, err
	}
	m, err := img.Manifest()
	if err != nil {
		return nil, err
	}
	seen := map[toc.Digest]bool{}
	for _, l := range m.Layers {
		t, err := readTOC(l, dir)
		if err != nil {
			return nil, err
		}
		for i := range t.Entries {
			content := t.Content(&t.Entries[i])
			key := toc.ObjectKey(content)
			if len(content) == 0 || seen[key] {
				continue
			}
			seen[key] = true
			for n, c := range content {
				if !c.Hole {
					list = append(list, piece{pack.Chunk{Object: binary.BigEndian.Uint64(key[:]), Index: n, Size: int(c.Size)}, t.Entries[i].Name, c.FileOffset, c.Digest})
				}
			}
		}
	}
	return list, nil
}

// read returns the bytes of a piece, if a folder with the image's files has them.
func (x *piece) read(root string) ([]byte, bool) {
	f, err := os.Open(filepath.Join(root, x.path))
	if err != nil {
		return nil, false
	}
	defer f.Close()
	b := make([]byte, x.Size)
	if _, err := f.ReadAt(b, x.off); err != nil {
		return nil, false
	}
	return b, sha256.Sum256(b) == x.digest
}

// A pace is how a blob comes: whole and at once up to byte slow, from there on with rate bytes a second (0 is not at all), and up to byte cut, where
// the connection is closed if that is not the end; or not at all, if it is refused.
type pace struct {
	cut, slow int64
	rate      float64
	refuse    bool
}

// handler answers with the section, or a range of it.
func (s section) handler(p pace) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if p.refuse {
			http.Error(w, "wrong", http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(&paced{ResponseWriter: w, q: q, pace: p}, q, "", time.Time{}, io.NewSectionReader(s, 0, s.size))
	})
}

// paced writes an answer's body as slowly as a pace says.
type paced struct {
	http.ResponseWriter
	q *http.Request
	pace
	begun bool
	at    int64 // in the blob
	slept time.Duration
}

func (w *paced) Write(b []byte) (int, error) {
	if !w.begun {
		w.begun = true
		fmt.Sscanf(w.Header().Get("Content-Range"), "bytes %d-", &w.at) // else it is the whole
	}
	done := 0
	for done < len(b) {
		// Up to where it changes, or in pieces of 100 ms.
		n := min(int64(len(b)-done), max(w.slow-w.at, 0))
		if w.at >= w.slow {
			n = min(int64(len(b)-done), max(int64(w.rate/10), 1))
			if err := w.wait(n); err != nil {
				return done, err
			}
		}
		if n = min(n, w.cut-w.at); n <= 0 {
			http.NewResponseController(w.ResponseWriter).Flush()
			panic(http.ErrAbortHandler)
		}
		m, err := w.ResponseWriter.Write(b[done:][:n])
		done += m
		w.at += int64(m)
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// wait sends what was written, and returns when n bytes more may be.
func (w *paced) wait(n int64) error {
	if err := http.NewResponseController(w.ResponseWriter).Flush(); err != nil {
		return err
	}
	var after <-chan time.Time // never
	if w.rate > 0 {
		after = time.After(time.Duration(float64(n) / w.rate * float64(time.Second)))
	}
	select {
	case <-after:
		return nil
	case <-w.q.Context().Done():
		return w.q.Context().Err()
	}
}

// A wrongUse says what a node fetched of a wrong pack, as seen at the registry, which may have sent some of it in vain.
type wrongUse struct {
	Requests int     `json:"requests"`
	Ended    int64   `json:"ended"`   // bytes, when the job had ended
	Bytes    int64   `json:"bytes"`   // and in all
	Removed  float64 `json:"removed"` // seconds from the removal of the image until nothing of the pack was being sent
	Content  int64   `json:"content"` // bytes of all files of the image, each content once
}

const (
	// wrongPause is for how long a pack may go on coming before the image is removed.
	wrongPause = 10 * time.Second
	// removedPatience is how long it may go on after that.
	removedPatience = 10 * time.Second
)

// after sees what becomes of the pack after the job, and when the image is removed.
func (n *node) after(ctx context.Context, im image, ref string) (*wrongUse, error) {
	of := func() (u wrongUse, busy bool) {
		log, _ := n.w.registry.traffic()
		for _, q := range log {
			if strings.HasPrefix(q.Path, "/v2/"+n.s.form.name+"/") && filepath.Base(q.Path) == filepath.Base(n.w.packs[im.Name].path) {
				u.Requests++
				u.Bytes += q.Bytes
				busy = busy || q.End == 0
			}
		}
		return u, busy
	}
	u, busy := of()
	if u.Requests == 0 {
		return nil, errors.New("nobody asked for the startup pack")
	}
	ended := u.Bytes
	for end := time.Now().Add(wrongPause); busy && time.Now().Before(end); _, busy = of() {
		time.Sleep(50 * time.Millisecond)
	}
	if err := run(ctx, n.w.Ctr, n.ctr("image", "rm", "--sync", ref)...); err != nil {
		return nil, err
	}
	removed := time.Now()
	for ; ; time.Sleep(50 * time.Millisecond) {
		u, busy = of()
		u.Ended, u.Removed, u.Content = ended, time.Since(removed).Seconds(), n.w.packs[im.Name].content
		if !busy {
			return &u, nil
		}
		if time.Since(removed) > removedPatience {
			return &u, fmt.Errorf("the startup pack is still being fetched %v after its image was removed", removedPatience)
		}
	}
}
