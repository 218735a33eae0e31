package convert

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"lazuli/convert/closure"
	"lazuli/fs/pack"
	"lazuli/fs/profile"
	"lazuli/fs/remote"
	"lazuli/fs/toc"
)

// A Pack is a startup pack that a conversion made.
type Pack struct {
	Image  v1.Hash `json:"image"`  // the manifest's digest
	Origin string  `json:"origin"` // what it was made of
	Digest v1.Hash `json:"digest"` // of its blob
	Size   int64   `json:"size"`   // of its blob, in bytes
	// Chunks and Content are what is in it: pieces of files, and their bytes.
	Chunks  int   `json:"chunks"`
	Content int64 `json:"content"`
	// Missing is how many files of the profile the image does not have.
	Missing int `json:"missing,omitempty"`
}

const (
	packShare  = 0.05      // what share of a profile's runs touches what is in a pack
	maxContent = 512 << 20 // bytes of files in a pack: it is made in memory
	packBatch  = 128       // chunks that are read side by side, some 20 MB
	// closureTime is a bound and no expectation: of an image of 600 MB, 300 MB of files are read and compressed in 5 s, and 120 MB are pushed.
	closureTime = time.Minute
)

// A namedPack is a pack with what it is written from: the bytes in a row would be in memory a second time.
type namedPack struct {
	Pack
	blob  v1.Descriptor
	build *pack.Builder
}

// open returns the pack's bytes.
func (p *namedPack) open() (io.ReadCloser, error) {
	r, w := io.Pipe()
	go func() { // ends when r is at its end or closed
		_, err := p.build.WriteTo(w)
		w.CloseWithError(err)
	}()
	return r, nil
}

// warn notes what the user has to know and what does not stop the conversion.
func (c *conversion) warn(format string, args ...any) {
	c.warnings = append(c.warnings, fmt.Sprintf(format, args...))
}

// namePack makes the startup pack of a profile, if there is one, and names it in manifest m. A pack that m names already goes over
// with the layers, or its name is taken away if they were replaced. It reports whether m changed.
func (c *conversion) namePack(ctx context.Context, n *node, m object, replaced bool) (changed bool, err error) {
	var notes map[string]string
	if raw, ok := m["annotations"]; ok {
		if err := json.Unmarshal(raw, &notes); err != nil {
			return false, fmt.Errorf("annotations: %w", err)
		}
	}
	old, has := pack.Named(notes)
	if !c.opts.NoPack && (c.opts.Pieces != nil || len(c.opts.Profile) > 0) {
		p, err := c.profilePack(ctx, n)
		if err == nil {
			err = c.dst.put(ctx, p.blob, p.open)
		}
		switch {
		case ctx.Err() != nil:
			return false, ctx.Err()
		case err == nil:
			n.pack, n.has = p, true
			if has && old.Digest == p.blob.Digest && old.Size == p.blob.Size {
				return false, nil
			}
			return true, m.annotate(map[string]string{
				pack.DigestAnnotation: p.blob.Digest.String(), pack.SizeAnnotation: strconv.FormatInt(p.blob.Size, 10),
			})
		case !errors.Is(err, errNothing):
			c.warn("%v: no startup pack: %v", n.desc.Digest, err)
		}
	}
	if !has {
		return false, nil
	}
	if !replaced {
		n.has = true
		if err := c.copyBlob(ctx, c.src, old, func(int) {}); err != nil {
			if ctx.Err() != nil {
				return false, ctx.Err()
			}
			c.warn("%v: its startup pack is lost: %v", n.desc.Digest, err)
		}
		return false, nil
	}
	delete(notes, pack.DigestAnnotation)
	delete(notes, pack.SizeAnnotation)
	m.set("annotations", notes)
	return true, nil
}

var errNothing = errors.New("the image has nothing of it")

// profilePack makes the pack of the profile that was given, with the image's tables of contents and its config.
func (c *conversion) profilePack(ctx context.Context, n *node) (*namedPack, error) {
	files, err := openContents(ctx, c.dst, n.lazy)
	if err != nil {
		return nil, err
	}
	p := c.opts.Pieces
	if p == nil {
		p = files.all(c.opts.Profile)
	}
	var b pack.Builder
	b.Table(toc.Digest(mustDecode(sum(n.config))), n.config)
	for _, l := range files.layers {
		b.Table(l.want.Digest, l.packed)
	}
	return files.pack(ctx, &b, p, pack.OriginProfile)
}

// all returns the profile of whole files.
func (c *contents) all(names []string) *profile.Profile {
	p := new(profile.Profile)
	for _, name := range names {
		f, _ := c.tree.Lookup(name)
		for i := 0; int64(i)*profile.PieceSize < max(f.Size, 1); i++ {
			p.Pieces = append(p.Pieces, profile.Piece{Path: name, Index: i, Share: 1, MS: float64(len(p.Pieces))})
		}
	}
	return p
}

// pack makes a startup pack of what a profile names, behind what is in b.
func (c *contents) pack(ctx context.Context, b *pack.Builder, p *profile.Profile, origin string) (*namedPack, error) {
	missing := map[string]bool{}
	layerOf := map[toc.Digest]int{}
	chunks := p.Chunks(packShare, func(path string) []toc.Chunk {
		f, ok := c.tree.Lookup(path)
		if !ok || f.Type != toc.Regular {
			missing[path] = true
			return nil
		}
		list := c.file(f)
		if key := toc.ObjectKey(list); len(list) > 0 {
			if _, ok := layerOf[key]; !ok {
				layerOf[key] = f.Layer
			}
		}
		return list
	})
	if len(chunks) == 0 {
		return nil, errNothing
	}
	x := &namedPack{Pack: Pack{Origin: origin, Missing: len(missing)}}
	// A batch is read while the one before it is compressed.
	var ahead errgroup.Group
	defer ahead.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	batches := slices.Collect(slices.Chunk(chunks, packBatch))
	read := func(i int) {
		if i < len(batches) {
			ahead.Go(func() error { return c.prefetch(ctx, batches[i], layerOf) })
		}
	}
	read(0)
	for i, batch := range batches {
		if err := ahead.Wait(); err != nil {
			return nil, err
		}
		if x.Content >= maxContent {
			break
		}
		read(i + 1)
		for _, y := range batch {
			data, err := c.chunk(ctx, layerOf[y.Key], y.Chunk)
			if err == nil {
				err = b.Chunk(y.Key, y.Index, y.Path, data)
			}
			if err != nil {
				return nil, err
			}
			x.Chunks++
			x.Content += int64(len(data))
		}
	}
	x.build = b
	hash := sha256.New()
	var err error
	if x.Size, err = b.WriteTo(hash); err != nil {
		return nil, err
	}
	x.Digest = v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(hash.Sum(nil))}
	x.blob = v1.Descriptor{MediaType: pack.MediaType, Digest: x.Digest, Size: x.Size}
	return x, nil
}

// prefetch reads the members of chunks side by side, and those that lie in a row together.
func (c *contents) prefetch(ctx context.Context, batch []profile.Chunk, layerOf map[toc.Digest]int) error {
	var members []memberID
	for _, y := range batch {
		if layer := layerOf[y.Key]; c.layers[layer].small(y.Chunk) {
			members = append(members, memberID{layer, y.Member})
		}
	}
	c.mu.Lock()
	members = slices.DeleteFunc(members, func(id memberID) bool { return c.members[id] != nil })
	c.mu.Unlock()
	slices.SortFunc(members, func(a, b memberID) int { return cmp.Or(a.layer-b.layer, cmp.Compare(a.member, b.member)) })
	members = slices.Compact(members)

	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(sideBySide)
	for len(members) > 0 {
		l, first, n := &c.layers[members[0].layer], members[0], 1
		for n < len(members) && members[n].layer == first.layer && members[n].member == l.end(members[n-1].member) && l.end(members[n].member)-first.member <= maxRow {
			n++
		}
		row := members[:n]
		members = members[n:]
		group.Go(func() error { return c.ahead(ctx, row) })
	}
	return group.Wait()
}

// pushPacks puts startup packs beside the images in a registry: those that their manifests name, so that the registry does not take
// their blobs for garbage and others find them as they find all packs; and for other images that of their command's static closure. It
// comes last, when the image is there and has its tag: what goes wrong is a warning.
func (c *conversion) pushPacks(ctx context.Context, root *node) {
	d, ok := c.dst.(*registryDest)
	if !ok || c.opts.NoPack {
		for n := range root.images {
			if n.pack != nil {
				c.packed(n, &n.pack.Pack)
			}
		}
		return
	}
	ctx, cancel := context.WithTimeoutCause(ctx, closureTime, fmt.Errorf("it took more than %v", closureTime))
	defer cancel()
	for n := range root.images {
		err := c.pushPack(ctx, d, n)
		if err != nil && !errors.Is(err, errNothing) {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			c.warn("%v: no startup pack beside the image: %v", n.out.Digest, err)
		}
	}
}

func (c *conversion) packed(n *node, p *Pack) {
	p.Image = n.out.Digest
	c.packs = append(c.packs, *p)
}

// images calls f for the images below n that a conversion makes lazy.
func (n *node) images(f func(*node) bool) {
	n.walk(map[v1.Hash]bool{}, f)
}

func (n *node) walk(seen map[v1.Hash]bool, f func(*node) bool) bool {
	if n == nil {
		return true
	}
	for _, child := range n.children {
		if !child.walk(seen, f) {
			return false
		}
	}
	if n.children != nil || n.lazy == nil || seen[n.out.Digest] {
		return true
	}
	seen[n.out.Digest] = true
	return f(n)
}

func (c *conversion) pushPack(ctx context.Context, d *registryDest, n *node) error {
	var command v1.ConfigFile
	if err := json.Unmarshal(n.config, &command); err != nil {
		return err
	}
	p := n.pack
	if p == nil {
		if n.has {
			return nil
		}
		args := slices.Concat(command.Config.Entrypoint, command.Config.Cmd)
		if len(args) == 0 {
			return nil
		}
		src, err := d.source()
		if err != nil {
			return err
		}
		there, err := remote.Referrers(ctx, src, n.out.Digest, pack.MediaType)
		if err != nil {
			return err
		}
		for _, a := range there {
			if o := a.Annotations[pack.OriginAnnotation]; o == "" || o == pack.OriginClosure || o == pack.OriginProfile {
				return nil // one that is as good, or better
			}
		}
		files, err := openContents(ctx, d, n.lazy)
		if errors.Is(err, toc.ErrNotLazy) {
			return nil
		}
		if err != nil {
			return err
		}
		needed, err := closure.Of(ctx, files, closure.Command{Args: args, Env: command.Config.Env, Dir: command.Config.WorkingDir})
		if err != nil {
			return err
		}
		if p, err = files.pack(ctx, &pack.Builder{Quick: true}, needed, pack.OriginClosure); err != nil {
			return err
		}
	}
	if _, err := d.putArtifact(ctx, artifact{
		subject: n.out, blob: p.blob, tag: p.Origin == pack.OriginProfile,
		notes: map[string]string{
			pack.OriginAnnotation:  p.Origin,
			pack.CommandAnnotation: pack.Command(command.Config.Entrypoint, command.Config.Cmd),
		},
		open: p.open,
	}); err != nil {
		return err
	}
	c.packed(n, &p.Pack)
	return nil
}

func mustDecode(h v1.Hash) (d toc.Digest) {
	d, err := toc.ParseDigest(h.String())
	if err != nil {
		panic(err) // h is a SHA-256 sum
	}
	return d
}
